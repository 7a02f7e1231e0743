"""Every malformed record with its reason, and the image modes; through the JSON-lines converter."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import picture, read_items, read_rejected, read_samples, rotated_picture, run_main
from PIL import Image

from convert.image_files import find_image
from convert.items import Note, Rejected
from convert.jsonl import find
from convert.records import check_object
from recipe.schema import Object, Sample

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "ho"}


def boxed(*box: Any, text: Any = "cat") -> dict[str, Any]:
    return {"images": ["good.jpg"], "objects": [{"bbox_2d": list(box), "desc": text}]}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`good.jpg` is 20 x 10; `outside.jpg` lies beside the image root."""
    images = tmp_path / "images"
    (images / "folder.jpg").mkdir(parents=True)
    (images / "good.jpg").write_bytes(picture())
    (images / "turned.jpg").write_bytes(rotated_picture())
    (images / "truncated.jpg").write_bytes(picture((200, 200))[:-200])
    (images / "truncated.png").write_bytes(picture((200, 200), kind="PNG")[:-40])
    (images / "text.jpg").write_text("not a picture")
    (images / "empty.jpg").write_bytes(b"")
    (tmp_path / "outside.jpg").write_bytes(picture())
    (images / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (images / "inner.jpg").symlink_to(images / "good.jpg")
    (images / "loop.jpg").symlink_to(images / "loop.jpg")
    return images


def items(root: Path, *records: Any) -> list[Any]:
    path = root.parent / "train.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in records))
    return read_items(find(path, root))


BAD_RECORDS: list[tuple[Any, str]] = [
    ({"images": ["none.jpg"]}, "missing file"),
    ({"images": ["folder.jpg"]}, "missing file"),
    ({"images": [""]}, "missing file"),
    ({"images": ["a\0b.jpg"]}, "missing file"),
    ({"images": ["x" * 5000]}, "missing file"),
    ({"images": ["loop.jpg"]}, "missing file"),
    ({"images": ["truncated.jpg"]}, "unreadable image"),
    ({"images": ["truncated.png"]}, "unreadable image"),
    ({"images": ["text.jpg"]}, "unreadable image"),
    ({"images": ["empty.jpg"]}, "unreadable image"),
    ({"images": ["../outside.jpg"]}, "path leaves the image root"),
    ({"images": ["link.jpg"]}, "is a link to outside --images"),
    ({"images": ["/etc/hostname"]}, "absolute path"),
    ({"images": ["good.jpg", "turned.jpg"]}, "more than one image"),
    ({"images": "good.jpg"}, "malformed record"),
    ({"images": [7]}, "malformed record"),
    ({"image": "good.jpg", "messages": [USER, ANSWER]}, "malformed record"),
    ({"images": ["good.jpg"], "width": 10, "height": 20}, "wrong size"),
    ({"images": ["turned.jpg"], "width": 20, "height": 10}, "wrong size"),
    (boxed(float("nan"), 1, 2, 3), "non-finite box"),
    (boxed(0, 1, float("inf"), 3), "non-finite box"),
    (boxed(5, 1, 2, 3), "inverted box"),
    (boxed(1, 5, 2, 3), "inverted box"),
    (boxed(2, 1, 2, 3), "zero-area box"),
    (boxed(20, 1, 20.5, 3), "zero-area box"),
    (boxed(30, 1, 40, 3), "box outside the image"),
    (boxed(1, 1, 21.5, 3), "box outside the image"),
    (boxed(-1.5, 1, 5, 3), "box outside the image"),
    (boxed(1, 1, 5, 11.5), "box outside the image"),
    (boxed(1, 2, 3), "malformed box"),
    (boxed(1, 2, 3, "4"), "malformed box"),
    (boxed(1, 2, 3, True), "malformed box"),
    (boxed(1, 2, 3, 10**400), "malformed box"),
    (boxed(1, 1, 2, 3, text=""), "empty caption"),
    (boxed(1, 1, 2, 3, text="  \n"), "empty caption"),
    (boxed(1, 1, 2, 3, text=None), "malformed record"),
    (boxed(1, 1, 2, 3, text="a<|im_end|>b"), "control token in a text"),
    (boxed(1, 1, 2, 3, text="\ud800"), "text beyond Unicode"),
    ({"images": ["good.jpg"], "objects": {"ref": ["a", "b"], "bbox": [[1, 1, 2, 2]]}}, "unequal lengths"),
    ({"images": ["good.jpg"], "objects": {"ref": ["a"]}}, "malformed record"),
    ({"images": ["good.jpg"], "objects": "cat"}, "malformed record"),
    ({"images": ["good.jpg"], "objects": ["cat"]}, "malformed record"),
    ({"objects": []}, "neither image nor messages"),
    ({}, "neither image nor messages"),
    (chat(USER, ANSWER, objects=[{"bbox_2d": [1, 1, 2, 2], "desc": "cat"}]), "objects without an image"),
    (chat(), "malformed messages"),
    (chat("hi"), "malformed messages"),
    (chat(ANSWER), "malformed messages"),
    (chat({"role": "tool", "content": "x"}), "malformed messages"),
    (chat({"role": "user", "content": 3}), "malformed messages"),
    (chat({"role": "user", "content": [{"type": "video"}]}), "malformed messages"),
    (chat(USER, {"role": "system", "content": "late"}), "malformed messages"),
    (chat({"role": "user", "content": "<image>what?"}, ANSWER), "malformed messages"),
    (chat({"role": "user", "content": "<image><image>"}, ANSWER, images=["good.jpg"]), "malformed messages"),
    (chat(USER, {"role": "assistant", "content": "<|im_end|>"}), "control token in a text"),
    ({"id": True, "images": ["good.jpg"]}, "malformed record"),
    ({"id": "", "images": ["good.jpg"]}, "malformed record"),
    ("{not json", "malformed json"),
    ('{"images": ["good.jpg"]', "malformed json"),
    ("[" * 100_000, "malformed json"),
    ("[1, 2]", "malformed record"),
    ('{"id": ' + "9" * 5000 + "}", "malformed json"),
]


@pytest.mark.parametrize(("record", "reason"), BAD_RECORDS)
def test_bad_record_is_rejected_whole(root: Path, record: Any, reason: str) -> None:
    [item] = items(root, record)
    assert isinstance(item, Rejected)
    assert item.reason == reason
    assert item.source == "train.jsonl: line 1"
    assert item.detail or reason == "neither image nor messages"


@pytest.mark.parametrize("cut", [3, 20, 200, 600])
@pytest.mark.parametrize("progressive", [False, True])
def test_every_part_of_a_jpeg_is_read(root: Path, cut: int, progressive: bool) -> None:
    """A check at an eighth of the size must not stop early."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(buffer, "JPEG", progressive=progressive)
    for name, data in (("noise.jpg", buffer.getvalue()), ("cut.jpg", buffer.getvalue()[:-cut])):
        (root / name).write_bytes(data)
    whole, bad = items(root, {"images": ["noise.jpg"], "width": 64, "height": 64}, {"images": ["cut.jpg"]})
    assert isinstance(whole, Sample)
    assert bad.reason == "unreadable image"


def test_the_same_picture_is_rejected_in_the_same_words(root: Path) -> None:
    [item] = items(root, {"images": ["empty.jpg"]})
    assert item.detail.startswith("empty.jpg: cannot decode an image of 0 bytes: no known image format (AVIF, ")


def test_a_picture_that_training_cannot_use(root: Path) -> None:
    (root / "floats.tiff").write_bytes(picture(mode="F", kind="TIFF"))
    [item] = items(root, {"images": ["floats.tiff"]})
    assert (item.reason, "floats" in item.detail) == ("unreadable image", True)


def test_one_bad_box_rejects_the_whole_record(root: Path) -> None:
    record = boxed(1, 1, 2, 2)
    record["objects"].append({"bbox_2d": [5, 5, 4, 4], "desc": "dog"})
    assert [type(item) for item in items(root, record)] == [Rejected]


def test_duplicate_id(root: Path) -> None:
    found = items(root, {"id": "a", "images": ["good.jpg"]}, {"id": "a", "images": ["turned.jpg"]})
    assert isinstance(found[0], Sample)
    assert found[1] == Rejected("a", "train.jsonl: line 2", "duplicate id", "an earlier record has the id 'a'")


def test_rounding_is_clipped_and_counted(root: Path) -> None:
    record = boxed(-1, -0.5, 21, 11)
    record["objects"].append({"bbox_2d": [0, 0, 20, 10], "desc": "exact"})
    note, sample = items(root, record)
    assert isinstance(note, Note)
    assert note.count == 1
    assert [item.box for item in sample.objects] == [(0, 0, 20, 10), (0, 0, 20, 10)]


def test_check_object_keeps_a_crowd_without_caption() -> None:
    crowd = Object((0, 0, 5, 5), "", iscrowd=True, area=3.0)
    assert check_object(crowd, 20, 10) is crowd


def test_link_inside_the_root_is_followed(root: Path) -> None:
    assert find_image(str(root.resolve()), "inner.jpg") == str((root / "good.jpg").resolve())


def _palette_png() -> bytes:
    image = Image.new("P", (20, 10), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.info["transparency"] = 0
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", transparency=0)
    return buffer.getvalue()


PICTURES = {
    "cmyk.jpg": picture(mode="CMYK"),
    "gray.jpg": picture(mode="L"),
    "sixteen.png": picture(mode="I;16", kind="PNG"),
    "palette.png": _palette_png(),
    "rgba.png": picture(mode="RGBA", kind="PNG"),
    "bilevel.png": picture(mode="1", kind="PNG"),
    "page.webp": picture(kind="WEBP"),
    "scan.tiff": picture(kind="TIFF"),
    "old.bmp": picture(kind="BMP"),
    "anim.gif": picture(mode="P", kind="GIF"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_picture_modes_keep_their_bytes(root: Path, name: str) -> None:
    (root / name).write_bytes(PICTURES[name])
    [sample] = items(root, {"images": [name], "width": 20, "height": 10})
    assert (sample.image, sample.width, sample.height) == (PICTURES[name], 20, 10)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(root: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    data = picture((20, 10), exif=exif)
    (root / "exif.jpg").write_bytes(data)
    [sample] = items(root, {"images": ["exif.jpg"]})
    assert (sample.width, sample.height) == ((20, 10) if orientation < 5 else (10, 20))
    assert sample.image == data


def test_boxes_are_checked_in_the_displayed_orientation(root: Path) -> None:
    tall = {"images": ["turned.jpg"], "objects": [{"bbox_2d": [1, 1, 9, 19], "desc": "cat"}]}
    wide = {"images": ["turned.jpg"], "objects": [{"bbox_2d": [1, 1, 19, 9], "desc": "cat"}]}
    good, bad = items(root, tall, wide)
    assert good.objects[0].box == (1, 1, 9, 19)
    assert bad.reason == "box outside the image"


def test_command_line_rejects_and_counts(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = root.parent / "train.jsonl", root.parent / "out"
    records = [boxed(1, 1, 2, 2), boxed(5, 1, 2, 3), boxed(9, 1, 2, 3), {"images": ["none.jpg"]}]
    path.write_text("\n".join(map(json.dumps, records)))
    arguments = ["--annotations", path, "--images", root, "--out", out, "--split", "train"]
    with pytest.raises(SystemExit, match=r"^error: train.jsonl: line 2 .*inverted box.*--strict"):
        run_main(monkeypatch, "jsonl", *arguments, "--strict")
    assert not (out / "train").exists()
    run_main(monkeypatch, "jsonl", *arguments)
    printed = capsys.readouterr().out
    assert "2  inverted box" in printed
    assert "1  missing file" in printed
    assert "rejected         3" in printed
    assert [row["reason"] for row in read_rejected(out)] == ["inverted box", "inverted box", "missing file"]
    assert [sample.id for sample in read_samples(out)] == ["train-000001"]
    with pytest.raises(SystemExit, match="not empty"):
        run_main(monkeypatch, "jsonl", *arguments)
    with pytest.raises(SystemExit, match=r"image folder .* does not exist"):
        run_main(monkeypatch, "jsonl", *arguments[:3], root / "nowhere", "--out", out, "--split", "other")
