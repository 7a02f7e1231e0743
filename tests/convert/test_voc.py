"""Pascal VOC xml, by hand."""

from pathlib import Path

import pytest
from convert_helpers import picture, read_items, read_rejected, read_samples, run_main

from convert.items import Item, Rejected
from convert.voc import find
from recipe.schema import Object, Sample


def voc(objects: str, filename: str = "good.jpg", size: str = "<width>20</width><height>10</height>") -> str:
    name = f"<filename>{filename}</filename>" if filename else ""
    return f"<annotation>{name}<size>{size}<depth>3</depth></size>{objects}</annotation>"


def box(xmin: object, ymin: object, xmax: object, ymax: object, name: str = "cat", more: str = "") -> str:
    corners = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "good.jpg").write_bytes(picture())
    return tmp_path / "images"


def convert(images: Path, **files: str) -> list[Item]:
    folder = images.parent / "xml"
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.xml").write_text(text)
    return read_items(find(folder, images))


def test_by_hand(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "xml"
    (folder / "deep").mkdir(parents=True)
    part = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    whole, hard = box(1, 1, 20, 10, more=part), box("2.5", 3, 4, 3, " dog ", "<difficult>1</difficult>")
    (folder / "b.xml").write_text(voc(whole + hard))
    (folder / "deep" / "a.xml").write_text(voc(""))
    (folder / "c.xml").write_text(voc("", size="<width>10</width><height>20</height>"))
    arguments = ["--annotations", folder, "--images", images, "--out", tmp_path / "out", "--split", "train"]
    run_main(monkeypatch, "voc", *arguments)
    data = picture()
    objects = (Object((0, 0, 20, 10), "cat"), Object((1.5, 2, 4, 3), "dog"))
    assert read_samples(tmp_path / "out") == [Sample("b", data, 20, 10, objects), Sample("deep/a", data, 20, 10, ())]
    assert [(row["id"], row["source"], row["reason"]) for row in read_rejected(tmp_path / "out")] == [
        ("c", "c.xml", "wrong size")
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<annotation>", "malformed xml"),
        ("", "malformed xml"),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "malformed xml"),
        (voc("", filename=""), "malformed record"),
        (voc("", filename="none.jpg"), "missing file"),
        (voc("", filename="../xml/a.xml"), "path leaves the image root"),
        (voc("", size="<width>20</width>"), "malformed record"),
        (voc("", size="<width>20</width><height>9</height>"), "wrong size"),
        (voc(box(1, 1, 20, "wide")), "malformed record"),
        (voc("<object><name>cat</name></object>"), "malformed record"),
        (voc(box("nan", 1, 20, 10)), "non-finite box"),
        (voc(box(9, 1, 3, 10)), "inverted box"),
        (voc(box(9, 1, 8, 10)), "zero-area box"),
        (voc(box(9, 1, 22, 10)), "box outside the image"),
        (voc(box(9, 1, 10, 10, name="")), "empty caption"),
        (voc(box(9, 1, 10, 10).replace("<name>cat</name>", "<part><name>head</name></part>")), "empty caption"),
    ],
)  # fmt: skip
def test_bad_file(images: Path, text: str, reason: str) -> None:
    [item] = convert(images, a=text)
    assert isinstance(item, Rejected)
    assert (item.id, item.source, item.reason) == ("a", "a.xml", reason)


def test_one_pixel_is_a_box(images: Path) -> None:
    [sample] = convert(images, a=voc(box(20, 10, 20, 10)))
    assert isinstance(sample, Sample)
    assert sample.objects == (Object((19, 9, 20, 10), "cat"),)


def test_empty_folder_is_an_error(images: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.xml file"):
        convert(images)
