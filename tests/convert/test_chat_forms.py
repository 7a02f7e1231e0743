"""Chats of other tools: the round trip, records as the tools write them, and what can go wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import picture, read_items, read_rejected, read_samples, run_main, write_json
from round_trip import assert_same, convert, draw_scenes

from convert.chat import find
from convert.items import Rejected
from recipe.data.chat import write_boxes
from recipe.schema import Object, Sample


def thousandths(item: Object, width: int, height: int) -> tuple[float, ...]:
    sides = (width, height, width, height)
    return tuple(round(value / side * 1000) for value, side in zip(item.box, sides, strict=True))


def answer_of(objects: tuple[Object, ...], width: int, height: int, kind: str) -> Any:
    """What the tool writes: the answer, and the key `objects`."""
    boxes = [[round(value, 2) for value in item.box] for item in objects]
    names = [item.caption for item in objects]
    if kind == "json":
        rows = [{"bbox_2d": box, "label": name} for box, name in zip(boxes, names, strict=True)]
        return f"```json\n{json.dumps(rows, ensure_ascii=False)}\n```", None
    if kind == "tokens":
        corners = [thousandths(item, width, height) for item in objects]
        marked = [
            f"<|object_ref_start|>{name}<|object_ref_end|><|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
            for name, (x1, y1, x2, y2) in zip(names, corners, strict=True)
        ]
        return " and ".join(marked), None
    return " and ".join(["<ref-object><bbox>"] * len(boxes)), {"ref": names, "bbox": boxes, "bbox_type": "real"}


@pytest.mark.parametrize("kind", ["json", "tokens", "placeholders"])
def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """An image of nothing has no boxes to read, so it says so. Thousandths of 301 pixels are 0.15 off at most."""
    scenes = draw_scenes(tmp_path / "images", ("cup", "fire hydrant", "Straße", "red_car"))
    records = []
    for scene in scenes:
        answer, told = answer_of(scene.objects, scene.width, scene.height, kind)
        turns = [{"from": "human", "value": "<image>\nFind it."}, {"from": "gpt", "value": answer or "nothing"}]
        told = told if scene.objects else {"ref": [], "bbox": []}
        records.append({"image": scene.path, "conversations": turns} | ({"objects": told} if told else {}))
    path = write_json(tmp_path / "train.json", records)
    arguments = ["--annotations", path, "--images", tmp_path / "images"]
    samples = convert(monkeypatch, tmp_path / "out", "chat", *arguments)
    assert_same(samples, scenes)
    assert read_rejected(tmp_path / "out") == []
    for sample in samples:
        parts = [part for message in sample.messages or () for part in message["content"] if part != message["content"]]
        named = [part["box"] for part in parts if isinstance(part, dict) and part["type"] == "box"]
        assert named == [list(item.box) for item in sample.objects or ()], "the chat names what the head is taught"


def converted(folder: Path, *records: Any, **options: Any) -> list[Any]:
    """All items of the records, next to `good.jpg` of 20 x 10 pixels, which they are about if they name no image."""
    (folder / "good.jpg").write_bytes(picture())
    path = folder / "train.jsonl"
    named = ({**({} if {"image", "images"} & set(record) else {"image": "good.jpg"}), **record} for record in records)
    path.write_text("\n".join(map(json.dumps, named)))
    return read_items(find(path, folder, **options))


def turns_of(sample: Sample) -> list[tuple[str, str]]:
    """Role and text of each turn, as a run would write it whose images are not resized."""
    messages = write_boxes(sample.messages or (), lambda box, image: str([round(value) for value in box]))
    texts = []
    for message in messages:
        content = message["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        texts.append((message["role"], "".join(part.get("text", "<image>") for part in parts)))
    return texts


ASKED = ("user", "<image>\nWhere?")
TURNS = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "There."}]
ANSWERED = [ASKED, ("assistant", "There.")]
SYSTEM = ("system", "Be brief.")


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"conversations": TURNS}, ANSWERED),
        ({"conversations": TURNS, "system": "Be brief.", "tools": ""}, [SYSTEM, *ANSWERED]),
        ({"conversations": [{"from": "system", "value": "Be brief."}, *TURNS]}, [SYSTEM, *ANSWERED]),
        (
            {"messages": [{"role": "user", "content": "<image>\nWhere?"}, {"role": "assistant", "content": "There."}]},
            ANSWERED,
        ),
        (
            {
                "image": None,
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": "file://good.jpg"},
                            {"type": "text", "text": "\nWhere?"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "There."}]},
                ],
            },
            ANSWERED,
        ),
        (
            {
                "images": ["good.jpg"],
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "good.jpg"}}]},
                    {"role": "assistant", "content": "There."},
                ],
            },
            [("user", "<image>"), ("assistant", "There.")],
        ),
        ({"images": [{"path": "good.jpg", "bytes": None}], "query": "<image>\nWhere?", "response": "There."}, ANSWERED),
        (
            {"query": "Sure?", "response": "Yes.", "history": [["<image>\nWhere?", "There."]], "system": "Be brief."},
            [SYSTEM, *ANSWERED, ("user", "Sure?"), ("assistant", "Yes.")],
        ),
        ({"conversation": [{"human": "<image>\nWhere?", "assistant": "There."}]}, ANSWERED),
        ({"instruction": "<image>", "input": "Where?", "output": "There.", "images": ["good.jpg"]}, ANSWERED),
        ({"instruction": "<image>\nWhere?", "input": "", "output": "There.", "history": None}, ANSWERED),
        (
            {
                "image": "",
                "conversations": [{"from": "user", "value": "Picture 1: <img>good.jpg</img>\nWhere?"}, TURNS[1]],
            },
            [("user", "<image>Where?"), ("assistant", "There.")],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "<|vision_start|><|image_pad|><|vision_end|>\nWhere?"},
                    TURNS[1],
                ]
            },
            ANSWERED,
        ),
    ],
)
def test_as_its_tools_write_it(tmp_path: Path, record: Any, turns: list[tuple[str, str]]) -> None:
    [sample] = converted(tmp_path, record)
    assert turns_of(sample) == turns
    assert (sample.id, sample.width, sample.objects) == ("train-000001", 20, None)


def test_a_chat_without_an_image(tmp_path: Path) -> None:
    [sample] = converted(tmp_path, {"image": None, "instruction": "Say [1, 2, 3, 4]", "output": "[1, 2, 3, 4]"})
    assert (sample.image, turns_of(sample)[1]) == (b"", ("assistant", "[1, 2, 3, 4]"))


LABELLED = '[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}, {"bbox_2d": [5, 6, 7, 8], "label": "jar"}]'
CUP, JAR = Object((1, 2, 3, 4), "cup"), Object((5, 6, 7, 8), "jar")
MARKED = "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(50,200),(150,400)<|box_end|>"
NO_NAME = "chats with answered boxes that have no name: not annotated"
LEFT = "chats with boxes left in their text, which do not follow a resize"


@pytest.mark.parametrize(
    ("answer", "objects", "text", "notes"),
    [
        (LABELLED, (CUP, JAR), LABELLED, []),
        (f"Here:\n```json\n{LABELLED}\n``` done.", (CUP, JAR), f"Here:\n```json\n{LABELLED}\n``` done.", []),
        (LABELLED.replace(", {", "\n{").strip("[]") + "]", (CUP, JAR), None, []),  # one object per line
        ('{"bbox_2d": [1,2,3,4], "label": "cup"}', (CUP,), '{"bbox_2d": [1, 2, 3, 4], "label": "cup"}', []),
        ('[{"label": "cup", "bbox_2d": [1.0, 2, 3, 4]}]', (CUP,), '[{"label": "cup", "bbox_2d": [1, 2, 3, 4]}]', []),
        (LABELLED.replace("jar", "cup").replace("5, 6, 7, 8", "1, 2, 3, 4"), (CUP,), None, []),
        ('{\n"bbox_2d": [1, 2, 3, 4]\n}', None, '{\n"bbox_2d": [1, 2, 3, 4]\n}', [NO_NAME]),
        (LABELLED.replace('"jar"', '""'), None, None, [NO_NAME]),
        (MARKED, (CUP,), "cup[1, 2, 3, 4]", []),
        (f"A {MARKED}, and {MARKED.replace('cup', 'jar')}.", (CUP, Object(CUP.box, "jar")), None, []),
        (f"{MARKED}<|box_start|>(250,600),(350,800)<|box_end|>", (CUP, Object(JAR.box, "cup")), None, []),
        ("<ref>cup</ref><box>(50,200),(150,400)</box>", (CUP,), "cup[1, 2, 3, 4]", []),
        ("<|box_start|>(50,200),(150,400)<|box_end|>", None, "[1, 2, 3, 4]", [NO_NAME]),
        (f"{MARKED} or {LABELLED}", None, f"cup[1, 2, 3, 4] or {LABELLED}", [LEFT]),
        ("It is at [1, 2, 3, 4].", None, "It is at [1, 2, 3, 4].", [LEFT]),
        ("It is at (1,2),(3,4).", None, "It is at (1,2),(3,4).", [LEFT]),
        (f"{LABELLED} or [1, 2, 3, 4]", None, f"{LABELLED} or [1, 2, 3, 4]", [LEFT]),
        (LABELLED.replace("8]", "8"), None, LABELLED.replace("8]", "8"), [LEFT]),
        ('[{"bbox_2d": [1, 2, 3], "label": "cup"}]', None, None, [LEFT]),
        ('[{"bbox_2d": ["a", 2, 3, 4], "label": "cup"}]', None, None, [LEFT]),
        ("<|quad_start|>(1,2),(3,2),(3,4),(1,4)<|quad_end|>", None, None, [LEFT]),
        ("<|box_start|>(5,6)<|box_end|>", None, None, [LEFT]),
        ("[]", None, "[]", []),
        ("Two [1, 2] or 3.", None, "Two [1, 2] or 3.", []),
    ],
)
def test_boxes_in_an_answer(tmp_path: Path, answer: str, objects: Any, text: str | None, notes: list[str]) -> None:
    *found, sample = converted(tmp_path, {"conversations": [TURNS[0], {"from": "gpt", "value": answer}]})
    assert sample.objects == objects
    assert [note.what for note in found] == notes
    if text is not None:
        assert turns_of(sample) == [ASKED, ("assistant", text)]


def test_boxes_in_a_question_follow_the_resize_and_are_no_objects(tmp_path: Path) -> None:
    asked = {"from": "human", "value": f"<image>What is in {MARKED}?"}
    [sample] = converted(tmp_path, {"conversations": [asked, {"from": "gpt", "value": "A cup."}]})
    assert (turns_of(sample)[0][1], sample.objects) == ("<image>What is in cup[1, 2, 3, 4]?", None)
    assert sample.messages[0]["content"][2] == {"type": "box", "box": [1, 2, 3, 4]}


def test_a_question_names_the_boxes_of_its_answer(tmp_path: Path) -> None:
    asked = {"from": "human", "value": "<image>Find the <|object_ref_start|>cup<|object_ref_end|>."}
    answer = {"from": "gpt", "value": "<|box_start|>(50,200),(150,400)<|box_end|>"}
    [sample] = converted(tmp_path, {"conversations": [asked, answer]})
    assert (turns_of(sample)[0][1], sample.objects) == ("<image>Find the cup.", (CUP,))
    *_, sample = converted(tmp_path, {"conversations": [asked, answer, {"from": "human", "value": "And?"}, answer]})
    assert sample.objects is None, "the second question names nothing"
    asked["value"] += " And the <|object_ref_start|>jar<|object_ref_end|>."
    note, sample = converted(tmp_path, {"conversations": [asked, answer]})
    assert (note.what, sample.objects) == (NO_NAME, None), "the box may be either's"


@pytest.mark.parametrize(
    ("answer", "kind", "objects", "text"),
    [
        (LABELLED.replace("[1, 2, 3, 4]", "[50, 200, 150, 400]").split(", {")[0] + "]", "norm1000", (CUP,), None),
        (MARKED.replace("(50,200),(150,400)", "(1,2),(3,4)"), "real", (CUP,), "cup[1, 2, 3, 4]"),
        ("At [0.05, 0.2, 0.15, 0.4].", "norm1", None, "At [1, 2, 3, 4]."),
        ("At (1, 2), (3, 4).", "real", None, "At [1, 2, 3, 4]."),
        ("Numbers [4, 3, 2, 1].", "real", None, "Numbers [4, 3, 2, 1]."),
    ],
)
def test_what_boxes_are_can_be_said(tmp_path: Path, answer: str, kind: str, objects: Any, text: str | None) -> None:
    record = {"conversations": [TURNS[0], {"from": "gpt", "value": answer}]}
    *_, by_record = converted(tmp_path, {**record, "bbox_type": kind})
    *_, by_flag = converted(tmp_path, record, bbox_type=kind)
    assert by_record == by_flag
    assert by_flag.objects == objects
    assert text is None or turns_of(by_flag)[1][1] == text


def test_two_units_in_one_chat_stay_text(tmp_path: Path) -> None:
    answers = [{"from": "gpt", "value": text} for text in (MARKED, LABELLED)]
    record = {"conversations": [TURNS[0], answers[0], {"from": "human", "value": "And?"}, answers[1]]}
    note, sample = converted(tmp_path, record)
    assert (note.what, sample.objects) == (LEFT, None)
    assert [text for _, text in turns_of(sample)] == ["<image>\nWhere?", MARKED, "And?", LABELLED]


SWIFT = {"query": "<image>Find <ref-object>.", "response": "<bbox><bbox>"}


@pytest.mark.parametrize(
    ("record", "objects", "turns"),
    [
        (
            {**SWIFT, "objects": {"ref": ["cup"], "bbox": [[1, 2, 3, 4], [5, 6, 7, 8]]}},
            (CUP, Object(JAR.box, "cup")),
            ["<image>Find cup.", "[1, 2, 3, 4][5, 6, 7, 8]"],
        ),
        (
            {
                "query": "<image>What is there?",
                "response": "<ref-object> <bbox><bbox>, <ref-object> <bbox>",
                "objects": {"ref": ["jar", "cup"], "bbox": [[5, 6, 7, 8], [4, 6, 7, 8], [1, 2, 3, 4]]},
            },
            (JAR, Object((4, 6, 7, 8), "jar"), CUP),
            ["<image>What is there?", "jar [5, 6, 7, 8][4, 6, 7, 8], cup [1, 2, 3, 4]"],
        ),
        (
            {
                "query": "<image>Find <bbox>",
                "response": "<ref-object>",
                "objects": json.dumps([{"caption": "cup", "bbox": [50, 200, 150, 400], "bbox_type": "norm_1000"}]),
            },
            (CUP,),
            ["<image>Find [1, 2, 3, 4]", "cup"],
        ),
        (
            {
                "query": "<image>Find <ref-object> and <ref-object>.",
                "response": "<bbox><bbox><bbox>",
                "objects": {"ref": ["cup", "jar"], "bbox": [[1, 2, 3, 4], [5, 6, 7, 8], [4, 6, 7, 8]]},
            },
            None,
            ["<image>Find cup and jar.", "[1, 2, 3, 4][5, 6, 7, 8][4, 6, 7, 8]"],
        ),
        (
            {"query": "<image>Open it", "response": "click('<bbox>')", "objects": {"ref": [], "bbox": [[1, 2, 3, 4]]}},
            None,
            ["<image>Open it", "click('[1, 2, 3, 4]')"],
        ),
        (
            {
                "query": "<image>Find <ref-object>.",
                "response": "<bbox>",
                "objects": {"ref": ["cup"], "bbox": [[0.05, 0.2, 0.15, 0.4]], "bbox_type": "norm1"},
            },
            (CUP,),
            ["<image>Find cup.", "[1, 2, 3, 4]"],
        ),
        ({"query": "<image>Any?", "response": "No.", "objects": []}, (), ["<image>Any?", "No."]),
        (
            {
                "query": "<image>Any?",
                "response": "At [1, 2, 3, 4].",
                "objects": [{"bbox_2d": [1, 2, 3, 4], "desc": "cup"}],
            },
            (CUP,),
            ["<image>Any?", "At [1, 2, 3, 4]."],
        ),
    ],
)
def test_objects_of_swift(tmp_path: Path, record: Any, objects: Any, turns: list[str]) -> None:
    *_, sample = converted(tmp_path, record, bbox_type="real" if "norm" in json.dumps(record) else None)
    assert (sample.objects, [text for _, text in turns_of(sample)]) == (objects, turns)


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        (
            {"images": ["good.jpg", "good.jpg"], "conversations": TURNS},
            "malformed messages",
            "1 image placeholders and 2",
        ),
        ({"video": "a.mp4", "conversations": TURNS}, "video or audio", "['video']"),
        ({"conversations": [*TURNS, {"from": "observation", "value": "x"}]}, "malformed messages", "'observation'"),
        ({"conversations": [TURNS[0]]}, "malformed messages", "no answer to learn from"),
        ({"query": "<image>Where?", "response": None}, "malformed messages", "no answer to learn from"),
        ({"response": "There."}, "malformed messages", "no user turn"),
        ({"query": "a", "response": "b", "history": [["a"]]}, "malformed messages", "pairs [question, answer]"),
        (
            {"conversation": [{"human": "<image>?", "assistant": "There."}, "x"]},
            "malformed record",
            "a pair of turns",
        ),
        ({"text": "x"}, "neither objects nor messages", "no chat under the keys ['image', 'text']"),
        ({"image": "https://x.org/a.jpg", "conversations": TURNS}, "missing file", "download it"),
        ({"image": "gone.jpg", "conversations": TURNS}, "missing file", "gone.jpg"),
        ({"image": 5, "conversations": TURNS}, "malformed record", "the path of an image is 5"),
        ({"conversations": ["hi"]}, "malformed record", "a message is 'hi'"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": 5}]}, "malformed messages", "neither text nor parts"),
        ({"conversations": [{"from": "human", "value": "<image><image>"}, TURNS[1]]}, "malformed messages", "2 image"),
        ({"image": None, "conversations": TURNS}, "malformed messages", "1 image placeholders and 0 images"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": "<|im_end|>"}]}, "control token in a text", "im_end"),
        (
            {"conversations": [TURNS[0], {"from": "gpt", "value": LABELLED.replace("8", "88")}]},
            "box outside",
            "object 2",
        ),
        (
            {"conversations": [TURNS[0], {"from": "gpt", "value": '{"bbox_2d": [1, 2, 3, 88]}'}]},
            "box outside",
            "which messages name",
        ),
        ({**SWIFT, "objects": {"ref": ["a"], "bbox": [[1, 2, 3, 4]]}}, "placeholder without a value", "2 <bbox>"),
        ({**SWIFT, "objects": {"ref": ["a"], "bbox": [[1, 2], [3, 4]]}}, "malformed box", "not four numbers"),
        ({**SWIFT, "objects": "[{"}, "malformed record", "objects is text, but not JSON"),
        (
            {**SWIFT, "objects": [{"caption": "a", "bbox": [1, 2, 3, 4], "bbox_type": "x"}]},
            "malformed record",
            "bbox_ty",
        ),
        ({**SWIFT}, "placeholder without a value", "objects only 0"),
    ],
)
def test_what_is_rejected(tmp_path: Path, record: Any, reason: str, detail: str) -> None:
    *_, item = converted(tmp_path, record)
    assert isinstance(item, Rejected), item
    assert (item.reason.startswith(reason), detail in item.detail) == (True, True), item


def test_keys_that_are_not_read_are_counted(tmp_path: Path) -> None:
    turns = [TURNS[0], {**TURNS[1], "loss": True}]
    notes = converted(tmp_path, {"conversations": turns, "chosen": "x", "source": "web", "channel": None})[:-1]
    assert [(note.what, note.count) for note in notes] == [
        ("messages with the key 'loss', which is not read", 1),
        ("records with the key 'chosen', which is not read", 1),
        ("records with the key 'source', which is not read", 1),
    ]


def test_ids_that_repeat(tmp_path: Path) -> None:
    """As in LLaVA's mixture, where several tasks share an image and its id."""
    records = [{"id": name, "conversations": TURNS} for name in ("a", "b", "a")]
    assert [item.id for item in converted(tmp_path, *records[:2])] == ["a", "b"]
    note, *samples = converted(tmp_path, *records)
    assert (note.count, [sample.id for sample in samples]) == (1, [f"train-00000{number}" for number in (1, 2, 3)])


@pytest.mark.parametrize("converter", ["chat", "jsonl"])
def test_texts_alone_need_no_folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converter: str) -> None:
    turns = [{"role": "user", "content": "how old are you?"}, {"role": "assistant", "content": "one"}]
    about_one = [{**turns[0], "content": "<image>how old is it?"}, turns[1]]
    records = [{"id": "text", "messages": turns}, {"id": "image", "images": ["good.jpg"], "messages": about_one}]
    path = write_json(tmp_path / "train.json", records)
    (tmp_path / "good.jpg").write_bytes(picture())
    arguments = ["--annotations", path, "--out", tmp_path / "out", "--split", "train", "--num-workers", "1"]
    run_main(monkeypatch, converter, *arguments)
    assert [sample.id for sample in read_samples(tmp_path / "out")] == ["text"]
    (rejected,) = read_rejected(tmp_path / "out")
    assert (rejected["id"], rejected["reason"]) == ("image", "missing file")
    assert rejected["detail"] == "'good.jpg': give the folder of the images with --images"


@pytest.mark.parametrize("name", ["conversations.jsonl", "box_tokens.jsonl", "swift_one_ref_two_boxes.jsonl"])
@pytest.mark.shared_data
def test_inputs_of_real_users(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    cases = shared_data.parent / "cases" / "data"
    arguments = ["--annotations", cases / "jsonl" / name, "--images", cases / "images"]
    run_main(monkeypatch, "chat", *arguments, "--out", tmp_path / "out", "--split", "train", "--num-workers", "1")
    assert len(read_samples(tmp_path / "out")) == 1
    assert read_rejected(tmp_path / "out") == []
