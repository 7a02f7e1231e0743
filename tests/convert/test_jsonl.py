"""JSON lines that are right, and what only they can have wrong; the rest is in test_records.py."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import picture, read_items, read_rejected, read_samples, run_main

from convert.items import Summary
from convert.jsonl import find
from recipe.data.chat import message_segments, write_boxes
from recipe.schema import Object, Sample

CHAT = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})
PARTS = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}, CHAT[1])


def test_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "good.jpg").write_bytes(picture())
    names = ["sub/good.jpg"]
    box = {"bbox_2d": [1, 2, 3.5, 4], "desc": " été "}
    records = [
        {"id": "a", "images": names, "objects": [box], "width": 20, "height": 10, "source": "ignored"},
        {"id": 5, "images": names, "objects": {"ref": ["x", "y"], "bbox": [[0, 0, 20, 10], [1, 1, 2, 2]]}},
        {"images": names, "objects": []},
        {"images": names, "objects": None, "messages": PARTS},
        {"messages": CHAT, "images": [], "objects": []},
        {"images": names, "objects": {"ref": [], "bbox": []}, "messages": None, "width": None, "height": None},
    ]
    lines = [json.dumps(record) for record in records]
    path = tmp_path / "train.jsonl"
    path.write_text("\ufeff" + "\n".join([lines[0], "", *lines[1:]]), encoding="utf-8")
    arguments = ["--annotations", path, "--images", tmp_path, "--out", tmp_path / "out", "--split", "train", "--strict"]
    run_main(monkeypatch, "jsonl", *arguments)
    data = picture()
    assert read_samples(tmp_path / "out") == [
        Sample("a", data, 20, 10, (Object((1, 2, 3.5, 4), "été"),)),
        Sample("5", data, 20, 10, (Object((0, 0, 20, 10), "x"), Object((1, 1, 2, 2), "y"))),
        Sample("train-000004", data, 20, 10, ()),
        Sample("train-000005", data, 20, 10, None, PARTS),
        Sample("train-000006", b"", 0, 0, None, CHAT),
        Sample("train-000007", data, 20, 10, ()),
    ]
    assert read_rejected(tmp_path / "out") == []


@pytest.mark.shared_data
def test_real_sentences(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 drone photos' sentences on grey images of their size: 4 of the 5880 boxes stick out."""
    (tmp_path / "gray.png").write_bytes(picture((960, 540), mode="1", kind="PNG"))
    rows = [json.loads(line) for line in (shared_data / "uav_region_sentences" / "regions.jsonl").open()]
    path = tmp_path / "uav.jsonl"
    with path.open("w") as lines:
        for row in rows:
            boxes = [[x, y, x + w, y + h] for x, y, w, h in (region["bbox"] for region in row["regions"])]
            objects = {"ref": [region["phrase"] for region in row["regions"]], "bbox": boxes}
            lines.write(json.dumps({"id": row["file_name"], "images": ["gray.png"], "objects": objects}) + "\n")
    arguments = ["--annotations", path, "--images", tmp_path, "--out", tmp_path / "out", "--split", "train"]
    run_main(monkeypatch, "jsonl", *arguments)
    samples, rejected = read_samples(tmp_path / "out"), read_rejected(tmp_path / "out")
    assert len(rows) == len(samples) + len(rejected) == 1000
    assert {row["reason"] for row in rejected} == {"box outside the image"}
    assert [row["id"] for row in rejected] == ["423.jpg", "1428.jpg", "939.jpg"]  # the fourth is out by 1 pixel


def found(path: Path, **options: Any) -> list[Any]:
    """All items of a file next to its images."""
    return read_items(find(path, path.parent, **options))


def converted(folder: Path, *records: Any, **options: Any) -> list[Any]:
    """All items of the records, next to `good.jpg` of 20 x 10 pixels."""
    (folder / "good.jpg").write_bytes(picture())
    path = folder / "train.jsonl"
    path.write_text("\n".join(json.dumps({"images": ["good.jpg"], **record}) for record in records))
    return found(path, **options)


def chat(*contents: Any) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, contents, strict=False)
    ]


def texts_of(sample: Sample) -> list[str]:
    """The turns of a chat, as a run would write them whose images are not resized."""
    messages = write_boxes(sample.messages or (), lambda box, image: str([round(value) for value in box]))
    return ["".join(part["text"] for part in message["content"] if part["type"] == "text") for message in messages]


@pytest.mark.parametrize(
    ("record", "keys"),
    [
        ({"conversations": [{"from": "human", "value": "hi"}]}, "['conversations']"),
        ({"query": "hi", "response": "ho", "history": []}, "['history', 'query', 'response']"),
        ({"images": [], "instruction": "x", "input": "", "output": "y"}, "['input', 'instruction', 'output']"),
        ({"images": [], "image": "good.jpg", "text": "x"}, "['text']"),
        ({"object": [{"bbox_2d": [1, 1, 2, 2], "desc": "x"}], "objects": None}, "['object']"),
        ({"message": CHAT, "width": 20, "height": 10, "id": "x"}, "['message']"),
    ],
)
def test_another_tools_keys_teach_nothing(tmp_path: Path, record: dict[str, Any], keys: str) -> None:
    [item] = converted(tmp_path, record)
    remedy = "read the chats of other tools with python -m convert.chat"
    if not record.keys() & {"conversations", "query", "instruction"}:
        remedy = "give objects or messages, as in convert/README.md"
    assert (item.reason, item.detail) == (
        "neither objects nor messages",
        f"the keys {keys} are not read: {remedy}",
    )


def test_keys_that_are_not_read_are_counted(tmp_path: Path) -> None:
    records = [{"objects": [], "source": "web"}, {"messages": CHAT, "source": "web", "tag": 1}, {}]
    summary = Summary()
    for item in converted(tmp_path, *records):
        summary.add(item)
    assert (summary.samples, summary.rejected) == (3, [])
    what = "records with the key '{}', which is not read"
    assert summary.notes == {what.format("source"): 2, what.format("tag"): 1}


BOXES = [[1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize(
    ("objects", "contents", "turns"),
    [
        (
            {"ref": ["cup", "cup"], "bbox": [BOXES[0], BOXES[0]]},
            ("<image>Where is <ref-object>?", "<ref-object> is at <bbox>."),
            ["Where is cup?", "cup is at [1, 2, 3, 4]."],
        ),
        (
            {"ref": ["cup"], "bbox": BOXES},
            ("Find every <ref-object>.", "<ref-object>: <bbox><bbox>"),
            ["Find every cup.", "cup: [1, 2, 3, 4][5, 6, 7, 8]"],
        ),
        (
            [{"bbox_2d": box, "label": text} for box, text in zip(BOXES, ("cup", "jar"), strict=True)],
            ("What?", '[{"bbox_2d": <bbox>, "label": "<ref-object>"}, {"bbox_2d": <bbox>, "label": "<ref-object>"}]'),
            ["What?", '[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}, {"bbox_2d": [5, 6, 7, 8], "label": "jar"}]'],
        ),
        (
            {"ref": ["cup", "jar"], "bbox": BOXES},
            ([{"type": "image"}, {"type": "text", "text": "In <bbox>?"}], "a <ref-object>", "And in <bbox>?", "yes"),
            ["In [1, 2, 3, 4]?", "a cup", "And in [5, 6, 7, 8]?", "yes"],
        ),
    ],
)
def test_placeholders_are_filled(tmp_path: Path, objects: Any, contents: Any, turns: list[str]) -> None:
    [*notes, sample] = converted(tmp_path, {"objects": objects, "messages": chat(*contents)})
    assert texts_of(sample) == turns
    assert [note.what for note in notes] == (["objects listed twice, taken once"] if "Where" in contents[0] else [])
    assert len({item.box for item in sample.objects}) == len(sample.objects)


def test_box_parts_are_in_pixels_and_clipped(tmp_path: Path) -> None:
    objects = {"ref": ["cup"], "bbox": [[0.25, 0.2, 1.04, 0.5]], "bbox_type": "norm1"}
    [*_, sample] = converted(tmp_path, {"objects": objects, "messages": chat("<bbox>?", "yes")})
    assert sample.objects[0].box == (5, 2, 20, 5)
    assert sample.messages[0]["content"] == [{"type": "box", "box": [5, 2, 20, 5]}, {"type": "text", "text": "?"}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"objects": {"ref": ["a"], "bbox": BOXES[:1]}, "messages": chat("<bbox><bbox>")}, "hold 2 <bbox>.* only 1"),
        ({"objects": {"ref": ["a", "b"], "bbox": BOXES}, "messages": chat("<ref-object>" * 3)}, "3 <ref-object>"),
        ({"messages": chat("hi", "<bbox>")}, "hold 1 <bbox>, objects only 0"),
        ({"objects": [], "messages": chat("<ref-object>", "none")}, "objects only 0"),
        ({"objects": {"ref": ["a", "b"], "bbox": BOXES[:1]}}, "2 ref and 1 bbox: write one ref per bbox, or a single"),
        ({"objects": {"ref": ["a"], "bbox": []}}, "1 ref and 0 bbox"),
        ({"objects": {"bbox": BOXES, "label": ["a", "b"]}}, r"has the keys \['bbox', 'label'\]"),
        ({"objects": [{"bbox": BOXES[0], "label": "a"}]}, r"has the keys \['bbox', 'label'\]"),
        ({"objects": {"ref": [], "bbox": [], "bbox_type": "norm100"}}, "bbox_type .* real, norm1, norm1000"),
        ({"objects": {"ref": [], "bbox": [], "bbox_type": ["real"]}}, "bbox_type"),
        ({"objects": {"ref": ["a"], "bbox": BOXES[:1], "bbox_type": "norm1"}, "bbox_type": "real"}, "bbox_type"),
    ],
)
def test_what_cannot_be_filled_is_rejected(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    [item] = converted(tmp_path, record)
    assert re.search(message, item.detail), item


def test_a_box_that_messages_name_is_never_dropped(tmp_path: Path) -> None:
    objects = {"ref": ["a", "b"], "bbox": [[1, 1, 1, 5], BOXES[0]]}
    records = [{"objects": objects}, {"objects": objects, "messages": chat("<bbox>?")}]
    note, sample, item = converted(tmp_path, *records, bad_boxes="drop")
    assert (note.count, len(sample.objects)) == (1, 1)
    assert (item.reason, "messages name as <bbox>" in item.detail) == ("zero-area box", True)


@pytest.mark.parametrize(
    ("kind", "box"), [("real", [5, 2, 10, 5]), ("norm1", [0.25, 0.2, 0.5, 0.5]), ("norm1000", [250, 200, 500, 500])]
)
def test_a_record_states_what_its_boxes_are(tmp_path: Path, kind: str, box: list[float]) -> None:
    lists = {"ref": ["cup"], "bbox": [box]}
    records = [
        {"objects": {**lists, "bbox_type": kind}},
        {"objects": lists, "bbox_type": kind},
        {"objects": [{"bbox_2d": box, "desc": "cup"}], "bbox_type": kind},
    ]
    samples = converted(tmp_path, *records, bbox_type="real")
    assert [sample.objects for sample in samples] == [(Object((5, 2, 10, 5), "cup"),)] * 3
    [sample] = converted(tmp_path, {"objects": lists}, bbox_type=kind)
    assert sample.objects == samples[0].objects


def test_qwens_own_marks_stay_in_a_chat(tmp_path: Path) -> None:
    messages = chat("Find <|object_ref_start|>it<|object_ref_end|>", "<|box_start|>(1,2),(3,4)<|box_end|>")
    quad, end = chat("<|quad_start|><|quad_end|>"), chat("hi", "<|box_end|><|im_end|>")
    sample, other, item = converted(tmp_path, {"messages": messages}, {"messages": quad}, {"messages": end})
    assert (list(sample.messages), list(other.messages)) == (messages, quad)
    assert item.detail == "<|im_end|>"
    assert [turn.text.count("<|box") for turn in message_segments(messages, True)][-2] == 2


@pytest.mark.parametrize("indent", [None, 1])
def test_one_json_array_is_read(tmp_path: Path, indent: int | None) -> None:
    (tmp_path / "good.jpg").write_bytes(picture())
    records = [{"images": ["good.jpg"], "objects": []}, {"id": 7, "images": ["good.jpg"]}, "x"]
    path = tmp_path / "all.json"
    path.write_text("\ufeff\n" + json.dumps(records, indent=indent), encoding="utf-8")
    first, second, bad = found(path)
    assert [first.id, second.id] == ["all-000001", "7"]
    assert (bad.source, bad.detail) == ("all.json: record 3", "the record is 'x', not a JSON object")


def test_a_reason_quotes_no_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    for text in (json.dumps([[1] * 5000]), json.dumps({"images": [], "objects": "x" * 5000}), '[{"a": 1},' * 5000):
        path.write_text(text)
        [item] = found(path)
        assert len(item.detail) < 420
    path.write_bytes('{"id": "你"}'.encode("gbk"))
    [item] = found(path)
    assert item.detail.endswith("is not UTF-8: save the file as UTF-8")


def test_a_name_beyond_unicode_costs_its_own_record_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.jpg").write_bytes(picture())
    names = ["\ud83d.jpg", "good.jpg", "\udcff\udc00.jpg", "a/\ude00/b.jpg"]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps({"images": [name], "objects": []}) for name in names))
    arguments = ["--annotations", path, "--images", tmp_path, "--out", tmp_path / "out", "--split", "train"]
    run_main(monkeypatch, "jsonl", *arguments)
    assert [sample.id for sample in read_samples(tmp_path / "out")] == ["train-000002"]
    assert [row["id"] for row in read_rejected(tmp_path / "out")] == [f"train-00000{number}" for number in (1, 3, 4)]


def test_follow_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As hub caches lay images out."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1f2e").write_bytes(picture())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").symlink_to("../blobs/1f2e")
    path = tmp_path / "train.jsonl"
    path.write_text('{"images": ["a.jpg"], "objects": []}')
    arguments = ["--annotations", path, "--images", tmp_path / "images", "--out", tmp_path / "out", "--split", "train"]
    with pytest.raises(SystemExit, match=r"is a link to outside --images: 'a.jpg': give --follow-links"):
        run_main(monkeypatch, "jsonl", *arguments)
    run_main(monkeypatch, "jsonl", *arguments, "--follow-links")
    assert [sample.image for sample in read_samples(tmp_path / "out")] == [picture()]
