"""Pascal VOC xml, by hand."""

from pathlib import Path

import pytest
from convert_helpers import picture, read_items, read_rejected, read_samples, run_main

from convert.items import Item, Note, Rejected
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
    for name in ("good.jpg", "better.jpg", "best.jpg"):
        (tmp_path / "images" / name).write_bytes(picture())
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
    (folder / "deep" / "a.xml").write_text(voc("", "better.jpg"))
    (folder / "c.xml").write_text(voc("", "best.jpg", size="<width>10</width><height>20</height>"))
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
        ('<?xml version="1.0" encoding="nonsense"?><annotation>', "malformed xml"),
        (voc("", filename=""), "missing file"),
        (voc("", filename="none.jpg"), "missing file"),
        (voc("", filename="../xml/a.xml"), "path leaves the image root"),
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
    assert item.detail.startswith("object 1: ") == ("<object>" in text)


@pytest.fixture
def layout(tmp_path: Path) -> tuple[Path, Path]:
    """Empty folders of xml files and of images."""
    for name in ("xml", "images"):
        (tmp_path / name).mkdir()
    return tmp_path / "xml", tmp_path / "images"


def fill(layout: tuple[Path, Path], images: list[str], **files: str) -> list[Item]:
    """Images of different heights, so that each can be told; `__` in a name of an xml file is a slash."""
    for position, name in enumerate(images):
        (layout[1] / name).parent.mkdir(parents=True, exist_ok=True)
        (layout[1] / name).write_bytes(picture((20, 10 + position)))
    for name, text in files.items():
        path = layout[0] / f"{name.replace('__', '/')}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_items(find(*layout))


@pytest.mark.parametrize(
    ("filename", "images", "xml", "found"),
    [
        ("a", ["a.jpg"], "a", 0),
        ("frame.01", ["frame.01.PNG", "frame.02.png"], "a", 0),
        ("img_7", ["img_6.jpg", "img_7.JPG"], "a", 1),
        ("a.png", ["a.jpg"], "a", 0),
        ("", ["a.jpg"], "a", 0),
        ("old name.jpg", ["b.jpg", "a.jpeg"], "a", 1),
        ("C:\\data\\set\\b.jpg", ["a0.jpg", "b.jpg"], "a", 1),
        ("D:\\set\\cls\\b.jpg", ["b.jpg", "cls/b.jpg"], "a", 1),
        ("cls\\b.jpg", ["b.jpg", "cls/b.jpg"], "a", 1),
        ("/somewhere/set/b.jpg", ["b.jpg"], "a", 0),
        ("../other/b.jpg", ["b.jpg"], "a", 0),
        ("b.jpg", ["b.jpg", "cls/b.jpg"], "cls__b", 1),
        ("b.jpg", ["b.jpg", "cls/c.jpg"], "cls__b", 0),
        ("cls/b.jpg", ["b.jpg", "cls/b.jpg"], "cls__b", 1),
        ("gone.jpg", ["b.jpg", "cls/b.jpg"], "cls__b", 1),
        ("gone.jpg", ["b.jpg"], "cls__b", 0),
        ("c.jpg", ["c.jpg", "deep/c.jpg"], "<deep>", 1),
    ],
)  # fmt: skip
def test_the_image_is_found(layout: tuple[Path, Path], filename: str, images: list[str], xml: str, found: int) -> None:
    text = voc(box(1, 1, 5, 5), filename, size="")
    if xml == "<deep>":
        xml, text = "a", text.replace("<annotation>", "<annotation><folder>C:\\x\\deep</folder>")
    items = fill(layout, images, **{xml: text})
    [sample] = (item for item in items if isinstance(item, Sample))
    assert sample.height == 10 + found
    notes = [item.what for item in items if isinstance(item, Note)]
    by_own_name = filename in ("", "old name.jpg", "gone.jpg")
    assert notes == ["images found by the name of their xml file, not by <filename>"] * by_own_name


@pytest.mark.parametrize(
    ("filename", "images", "reason"),
    [
        ("b.jpg", ["a.jpg", "b.jpg"], "ambiguous image"),
        ("a", ["a.jpg", "a.png"], "ambiguous image"),
        ("", ["a.jpg", "a.png"], "ambiguous image"),
        ("", ["b.jpg"], "missing file"),
        ("gone.jpg", ["b.jpg"], "missing file"),
        ("a\\gone.jpg", ["b.jpg"], "missing file"),
    ],
)
def test_an_image_that_nobody_can_tell(
    layout: tuple[Path, Path], filename: str, images: list[str], reason: str
) -> None:
    [item] = fill(layout, images, a=voc(box(1, 1, 5, 5), filename, size=""))
    assert isinstance(item, Rejected)
    assert item.reason == reason


def test_two_files_about_one_image(layout: tuple[Path, Path]) -> None:
    same, other = voc(box(1, 1, 5, 5), "b.jpg"), voc(box(1, 1, 6, 6), "b.jpg")
    first, second = fill(layout, ["b.jpg"], x=same, y=same)
    assert isinstance(first, Sample)
    assert isinstance(second, Rejected)
    assert (second.reason, "x.xml" in second.detail) == ("duplicate image", True)
    items = fill(layout, ["b.jpg"], z=other)
    assert [item.reason for item in items if isinstance(item, Rejected)] == ["duplicate image"] * 3


def test_hidden_files_are_skipped_and_counted(layout: tuple[Path, Path]) -> None:
    (layout[0] / "._a.xml").write_bytes(b"\0\5\x16\7 Mac OS X")
    (layout[0] / ".trash").mkdir()
    (layout[0] / ".trash" / "b.xml").write_text(voc(""))
    (layout[0] / "__MACOSX").mkdir()
    (layout[0] / "__MACOSX" / "._c.xml").touch()
    note, sample = fill(layout, ["a.jpg"], a=voc("", "a.jpg"))
    assert isinstance(note, Note)
    assert (note.what, note.count) == ("hidden files skipped", 3)
    assert isinstance(sample, Sample)


@pytest.mark.parametrize(
    ("declared", "encoding", "name"),
    [
        ("gb2312", "gbk", "\u676f"),
        ("GBK", "gb18030", "\u9555\u4e00"),
        ("Shift_JIS", "cp932", "\u2460\u732b"),
        ("big5", "big5", "\u676f"),
        ("euc-kr", "cp949", "\uace0\uc591"),
        ("windows-1251", "cp1251", "\u043a\u043e\u0442"),
        ("utf-16", "utf-8", "caf\u00e9"),
        ("utf-16", "utf-16", "caf\u00e9"),
        ("nonsense", "utf-8", "caf\u00e9"),
        ("utf-8", "utf-8-sig", "caf\u00e9"),
    ],
)
def test_encodings(layout: tuple[Path, Path], declared: str, encoding: str, name: str) -> None:
    text = f'<?xml version="1.0" encoding="{declared}"?>\n' + voc(box(1, 1, 5, 5, name), "a.jpg")
    (layout[0] / "a.xml").write_bytes(text.encode(encoding))
    [sample] = fill(layout, ["a.jpg"])
    assert isinstance(sample, Sample)
    assert [item.caption for item in sample.objects or ()] == [name]


@pytest.mark.parametrize("declaration", ["", '<?xml version="1.0" encoding="utf-8"?>'])
def test_an_encoding_that_nobody_can_tell(layout: tuple[Path, Path], declaration: str) -> None:
    (layout[0] / "a.xml").write_bytes((declaration + voc(box(1, 1, 5, 5, "\u676f"), "a.jpg")).encode("gbk"))
    [item] = fill(layout, ["a.jpg"])
    assert isinstance(item, Rejected)
    assert (item.reason, "save the file as UTF-8" in item.detail) == ("malformed xml", True)


@pytest.mark.parametrize("size", ["", "<width/><height/>", "<width>0</width><height>0</height>", "<width>20</width>"])
def test_a_size_that_is_not_known(layout: tuple[Path, Path], size: str) -> None:
    [sample] = fill(layout, ["a.jpg"], a=voc("", "a.jpg", size=size))
    assert isinstance(sample, Sample)


def test_box_options(layout: tuple[Path, Path]) -> None:
    fractions = voc(box(0.25, 0.2, 0.5, 1), "a.jpg")
    with pytest.raises(ValueError, match="--bbox-type norm1"):
        fill(layout, ["a.jpg"], a=fractions)
    [sample] = read_items(find(*layout, bbox_type="norm1"))
    assert isinstance(sample, Sample)
    assert sample.objects == (Object((5, 2, 10, 10), "cat"),)
    (layout[0] / "a.xml").write_text(voc(box(1, 1, 5, 5) + box(9, 1, 8, 10) + box(15, 5, 90, 6), "a.jpg"))
    [item] = read_items(find(*layout))
    assert isinstance(item, Rejected)
    assert item.detail.startswith("object 2: ")
    items = read_items(find(*layout, bad_boxes="drop"))
    assert [item.examples for item in items if isinstance(item, Note)] == [("a: object 2",), ("a: object 3",)]
    assert isinstance(items[-1], Sample)
    assert [item.box for item in items[-1].objects or ()] == [(0, 0, 5, 5), (14, 4, 20, 6)]


def test_one_pixel_is_a_box(images: Path) -> None:
    [sample] = convert(images, a=voc(box(20, 10, 20, 10)))
    assert isinstance(sample, Sample)
    assert sample.objects == (Object((19, 9, 20, 10), "cat"),)


def test_empty_folder_is_an_error(images: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.xml file"):
        convert(images)
