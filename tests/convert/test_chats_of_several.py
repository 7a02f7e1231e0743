"""Chats of several images: every box comes back on its own image, and a box of an unknown image is never guessed."""

import json
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import picture, read_items, read_rejected, run_main
from round_trip import NEAR, Scene, convert, draw_scenes

from convert import chat, jsonl
from convert.items import Note, Rejected
from convert.verify import verify
from recipe.data.chat import write_boxes
from recipe.schema import Object, Sample

NAMES = ("cup", "fire hydrant", "Straße")


def swift(scenes: list[Scene]) -> dict[str, Any]:
    """A question about all images, with ms-swift's `image_id`."""
    owned = [(number, item) for number, scene in enumerate(scenes) for item in scene.objects]
    return {
        "images": [scene.path for scene in scenes],
        "messages": [
            {"role": "user", "content": "<image>" * len(scenes) + "Find it."},
            {"role": "assistant", "content": " and ".join(["<ref-object><bbox>"] * len(owned)) or "nothing"},
        ],
        "objects": {
            "ref": [item.caption for _, item in owned],
            "bbox": [list(item.box) for _, item in owned],
            "image_id": [number for number, _ in owned],
        },
    }


def qwen(scenes: list[Scene]) -> dict[str, Any]:
    """A question about each image: an answer's boxes are of the image before it."""
    turns = []
    for scene in scenes:
        rows = [{"bbox_2d": [round(value, 2) for value in item.box], "label": item.caption} for item in scene.objects]
        turns.append({"from": "human", "value": "<image>Find it."})
        turns.append({"from": "gpt", "value": json.dumps(rows, ensure_ascii=False) if rows else "nothing"})
    return {"image": [scene.path for scene in scenes], "conversations": turns}


def listed(scenes: list[Scene]) -> dict[str, Any]:
    """convert.jsonl's own form."""
    owned = [(number, item) for number, scene in enumerate(scenes) for item in scene.objects]
    return {
        "images": [scene.path for scene in scenes],
        "objects": [
            {"bbox_2d": list(item.box), "desc": item.caption, "image": number} for number, item in reversed(owned)
        ],
        "empty_images": [number for number, scene in enumerate(scenes) if not scene.objects],
        "messages": [{"role": "user", "content": "<image>" * len(scenes)}, {"role": "assistant", "content": "<bbox>"}],
    }


def corners(objects: Any) -> list[Any]:
    return sorted((item.caption, *item.box) for item in objects or ())


@pytest.mark.parametrize(("name", "form"), [("chat", swift), ("chat", qwen), ("jsonl", listed), ("jsonl", swift)])
def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: Any) -> None:
    """Records of 1, 2 and 3 images, one of them turned and one of nothing; of an image of nothing a chat knows less."""
    scenes = draw_scenes(tmp_path / "images", NAMES)
    groups = [scenes[:3], scenes[3:5], *([scene] for scene in scenes[5:8]), scenes[8:]]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(form(group)) for group in groups))
    samples = convert(monkeypatch, tmp_path / "out", name, "--annotations", path, "--images", tmp_path / "images")
    assert read_rejected(tmp_path / "out") == [] and list(verify(tmp_path / "out" / "train", decode=True)) == []
    assert [len(sample.per_image()) for sample in samples] == [len(group) for group in groups]
    for sample, group in zip(samples, groups, strict=True):
        for view, scene in zip(sample.per_image(), group, strict=True):
            assert view.image == (tmp_path / "images" / scene.path).read_bytes()
            assert (view.width, view.height) == (scene.width, scene.height)
            assert (view.objects is None) == (not scene.objects and form is not listed)
            for found, wanted in zip(corners(view.objects), corners(scene.objects), strict=True):
                assert found[0] == wanted[0] and found[1:] == pytest.approx(wanted[1:], abs=NEAR)
        if form is not listed:  # the chat names what the head is taught
            parts = [part for message in sample.messages or () for part in message["content"]]
            boxes = [part for part in parts if isinstance(part, dict) and part["type"] == "box"]
            owned = [
                (number, item.box) for number, view in enumerate(sample.per_image()) for item in view.objects or ()
            ]
            assert sorted((part.get("image", 0), tuple(part["box"])) for part in boxes) == sorted(owned)
            assert all(("image" in part) == bool(sample.further) for part in boxes)


def converted(folder: Path, convert: Any, record: dict[str, Any], **options: Any) -> list[Any]:
    for name, size in (("a.jpg", (20, 10)), ("b.jpg", (40, 80))):
        (folder / name).write_bytes(picture(size))
    path = folder / "train.jsonl"
    path.write_text(json.dumps({"images": ["a.jpg", "b.jpg"], **record}))
    return read_items(convert.find(path, folder, **options))


def turns(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]}


FOUND = '[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]'
CUP = (Object((1.0, 2.0, 3.0, 4.0), "cup"),)


@pytest.mark.parametrize(
    ("texts", "objects"),
    [
        (("<image>?", FOUND, "<image>?", "None."), (CUP, None)),
        (("<image>?", "None.", "<image>?", FOUND), (None, CUP)),
        (("<image>?", "None.", "<image>?", "One.", "Where?", FOUND), (None, CUP)),
        (("<image>?", FOUND, "<image>?", FOUND), (CUP, CUP)),
        (("<image><image>Which one?", FOUND), None),
        (("Compare.", FOUND), None),  # both images open this turn
        (("<image>?", FOUND, "<image>?", "None [1, 2, 3, 4]."), None),  # a box that cannot be read
    ],
)
def test_a_box_is_of_the_only_image_of_the_last_question_with_images(
    tmp_path: Path, texts: tuple[str, ...], objects: Any
) -> None:
    items = converted(tmp_path, chat, turns(*texts))
    *notes, sample = items
    assert isinstance(sample, Sample)
    assert [view.objects for view in sample.per_image()] == list(objects or (None, None))
    if objects is None:
        assert len(notes) == 1 and isinstance(notes[0], Note) and "left in their text" in notes[0].what
        written = write_boxes(sample.messages or (), lambda box, image: str([round(value) for value in box]))
        assert "[1, 2, 3, 4]" in json.dumps(written)


def test_thousandths_are_of_their_own_image(tmp_path: Path) -> None:
    token = "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>"
    (sample,) = converted(tmp_path, chat, turns("<image>?", "None.", "<image>?", token))
    assert [view.objects for view in sample.per_image()] == [None, (Object((4.0, 16.0, 12.0, 32.0), "cup"),)]
    (part,) = [part for part in sample.messages[3]["content"] if part["type"] == "box"]
    assert part == {"type": "box", "box": [4.0, 16.0, 12.0, 32.0], "image": 1}


def test_the_order_is_that_of_the_places(tmp_path: Path) -> None:
    """Parts that name their images, one of them twice, next to a list in another order."""
    parts = [{"type": "image", "image": name} for name in ("b.jpg", "a.jpg", "b.jpg")]
    chats = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Two."}]}
    (sample,) = converted(tmp_path, chat, chats)
    assert [view.width for view in sample.per_image()] == [40, 20, 40]


@pytest.mark.parametrize(
    ("convert", "record", "reason", "detail"),
    [
        (jsonl, {"objects": []}, "more than one image", "2 images and no messages"),
        (jsonl, turns("<image>?", "a"), "malformed messages", "1 image placeholders and 2 images"),
        (
            jsonl,
            {**turns("?", "a"), "objects": [{"bbox_2d": [1, 2, 3, 4], "desc": "x"}]},
            "malformed record",
            "which of 2",
        ),
        (
            jsonl,
            {**turns("?", "a"), "objects": [{"bbox_2d": [1, 2, 3, 4], "desc": "x", "image": 2}]},
            "malformed record",
            "from 0 to 1",
        ),
        (
            jsonl,
            {
                **turns("?", "a"),
                "objects": [{"bbox_2d": [1, 2, 3, 4], "desc": "x", "image": 1}],
                "empty_images": [1],
            },
            "malformed record",
            "list some of [0]",
        ),
        (
            jsonl,
            {**turns("?", "a"), "objects": [{"bbox_2d": [1, 2, 30, 4], "desc": "x", "image": 0}]},
            "box outside the image",
            "20x10",
        ),
        (
            chat,
            {**turns("<image><image>?", "<bbox>"), "objects": {"ref": ["x"], "bbox": [[1, 2, 3, 4]]}},
            "box of an unknown image",
            "image_id",
        ),
        (
            chat,
            {**turns("?", "<bbox>"), "objects": {"ref": ["x"], "bbox": [[1, 2, 3, 4]], "image_id": [0, 1]}},
            "unequal lengths",
            "[0, 1] for 1 bbox",
        ),
        (chat, {"images": ["a.jpg", "gone.jpg"], **turns("?", "a")}, "missing file", "gone.jpg"),
    ],
)
def test_what_is_rejected(tmp_path: Path, convert: Any, record: dict[str, Any], reason: str, detail: str) -> None:
    (item,) = converted(tmp_path, convert, record)
    assert isinstance(item, Rejected)
    assert item.reason == reason and detail in item.detail


def test_the_summary_counts_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = draw_scenes(tmp_path / "images", NAMES, num_scenes=4)
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, (listed(scenes[:3]), listed(scenes[3:])))))
    run_main(
        monkeypatch, "jsonl", "--annotations", path, "--images", tmp_path / "images", "--out", tmp_path / "out",
        "--split", "train", "--num-workers", 1,
    )  # fmt: skip
    assert "2  (4 images, 1 samples with several, 1 known to hold nothing, 0 not annotated)" in capsys.readouterr().out
