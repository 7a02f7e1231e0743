"""YOLO labels: the round trip, sets as their tools write them, and what can go wrong."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
from convert_helpers import picture, read_items, read_rejected, read_samples, run_main
from round_trip import assert_same, convert, draw_scenes

from convert.items import Note, Rejected
from convert.yolo import _parse_boxes, _parse_line, find
from recipe.records import CLASSES_FILE
from recipe.schema import Object, Sample

NAMES = ("cup", "fire hydrant", "Straße", "red_car")
YAML = "train: images/train\nval: images/val\nnames:\n" + "".join(f"  {n}: {name}\n" for n, name in enumerate(NAMES))


def label_line(item: Object, width: int, height: int, kind: str) -> str:
    """A line of a label file with the six digits that tools write."""
    x1, y1, x2, y2 = item.box
    values: tuple[float, ...] = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
    if kind == "polygon":
        values = (x1, y1, (x1 + x2) / 2, y1, x2, y1, x2, y2, x1, y2)
    if kind == "four points":
        values = (x2, (y1 + y2) / 2, (x1 + x2) / 2, y2, x1, (y1 + y2) / 2, (x1 + x2) / 2, y1)
    sides = (width, height) * 5
    return " ".join([str(NAMES.index(item.caption)), *(f"{v / s:.6f}" for v, s in zip(values, sides, strict=False))])


@pytest.mark.parametrize("kind", ["box", "polygon", "four points"])
def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    scenes = draw_scenes(tmp_path, NAMES, folder="images/train/")
    (tmp_path / "labels" / "train").mkdir(parents=True)
    for scene in scenes:
        lines = [label_line(item, scene.width, scene.height, kind) + "\n" for item in scene.objects]
        path = tmp_path / scene.path.replace("images", "labels")
        path.with_suffix(".txt").write_text("".join(lines))
    (tmp_path / "data.yaml").write_text(YAML)
    samples = convert(monkeypatch, tmp_path / "out", "yolo", "--annotations", tmp_path / "data.yaml")
    assert [sample.id for sample in samples] == [scene.path for scene in scenes]
    assert_same(samples, scenes)
    assert read_rejected(tmp_path / "out") == []
    assert (tmp_path / "out" / "train" / CLASSES_FILE).read_text(encoding="utf-8").splitlines() == list(NAMES)


def lay_out(folder: Path, files: dict[str, str]) -> Path:
    """Write the files; those with an image's suffix are images of 20 x 10 pixels."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture() if name.endswith((".jpg", ".png")) else text.encode())
    return folder


BOX = "1 0.5 0.5 0.5 0.4\n"
OBJECT = Object((5, 3, 15, 7), "dog")
LAYOUTS: dict[str, tuple[str, str, dict[str, str], list[str]]] = {
    "ultralytics": (
        "data.yaml",
        "val",
        {
            "data.yaml": "path: .\ntrain: images/a\nval: [images/b, images/c]\nnames: [cat, dog]\nnc: 2\n",
            "images/a/x.jpg": "",
            "images/b/y.jpg": "",
            "labels/b/y.txt": BOX,
            "images/c/deep/z.PNG.jpg": "",
            "labels/c/deep/z.PNG.txt": BOX,
            "images/c/.hidden.jpg": "",
        },
        ["images/b/y.jpg", "images/c/deep/z.PNG.jpg"],
    ),
    "roboflow": (
        "data.yaml",
        "val",
        {
            "data.yaml": "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']\n",
            "train/images/x.jpg": "",
            "valid/images/y.jpg": "",
            "valid/labels/y.txt": BOX,
        },
        ["valid/images/y.jpg"],
    ),
    "stale path, file of paths": (
        "",
        "train",
        {
            "data.yaml": "path: /nowhere/coco\ntrain: train.txt\nval:\nnames: {0: cat, 1: dog}\n",
            "train.txt": "./images/y.jpg\n\nimages/z.jpg\n",
            "images/y.jpg": "",
            "images/z.jpg": "",
            "images/not listed.jpg": "",
            "labels/y.txt": BOX,
            "labels/z.txt": BOX,
        },
        ["images/y.jpg", "images/z.jpg"],
    ),
    "cvat's darknet": (
        "obj.data",
        "train",
        {
            "obj.data": "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n",
            "obj.names": "cat\ndog\n",
            "train.txt": "data/obj_train_data/y.jpg\n",
            "obj_train_data/y.jpg": "",
            "obj_train_data/y.txt": BOX,
        },
        ["obj_train_data/y.jpg"],
    ),
    "labelImg": (
        "",
        "train",
        {"classes.txt": "cat\ndog\n", "y.jpg": "", "y.txt": BOX, "deep/z.jpg": "", "deep/z.txt": BOX},
        ["deep/z.jpg", "y.jpg"],
    ),
    "Label Studio": (
        "",
        "train",
        {"classes.txt": "cat\ndog", "notes.json": "{}", "images/y.jpg": "", "labels/y.txt": BOX},
        ["images/y.jpg"],
    ),
    "parts without data.yaml": (
        "",
        "val",
        {"obj.names": "cat\ndog", "images/train/x.jpg": "", "images/valid/y.jpg": "", "labels/valid/y.txt": BOX},
        ["images/valid/y.jpg"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_its_tools_lay_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    name, split, files, ids = LAYOUTS[layout]
    folder = lay_out(tmp_path / "set", files)
    arguments = ["--annotations", folder / name, "--out", tmp_path / "out", "--split", split]
    run_main(monkeypatch, "yolo", *arguments)
    assert read_samples(tmp_path / "out", split) == [Sample(key, picture(), 20, 10, (OBJECT,)) for key in ids]
    assert read_rejected(tmp_path / "out") == []


def converted(
    folder: Path, label: str | None, yaml: str = "train: images\nnames: [cat, dog]", **options: Any
) -> list[Any]:
    """All items of `y.jpg` with this label file, next to an image that has one."""
    files = {"data.yaml": yaml, "images/good.jpg": "", "labels/good.txt": BOX, "images/y.jpg": ""}
    lay_out(folder, files | ({} if label is None else {"labels/y.txt": label}))
    items: list[Any] = read_items(find(folder / "data.yaml", "train", **options))
    assert isinstance(items[0], Sample)
    return items[1:]


@pytest.mark.parametrize(
    ("label", "reason", "detail"),
    [
        ("2 0.5 0.5 0.5 0.4", "unknown category", "line 1: class 2: names has the classes 0 to 1"),
        ("\n-1 0.5 0.5 0.5 0.4", "unknown category", "line 2: class -1"),
        ("0.5 0.5 0.5 0.5 0.4", "unknown category", "class 0.5"),
        ("cat 0.5 0.5 0.5 0.4", "malformed record", "'cat 0.5 0.5 0.5 0.4' is not a class and numbers"),
        ("nan 0.5 0.5 0.5 0.4", "unknown category", "class nan"),
        ("0 0.5 0.5 0.5", "malformed box", "3 numbers after the class"),
        (
            "0 0.5 0.5 0.5 0.4 0.5 0.5 0.5",
            "malformed box",
            "7 numbers after the class: a box has 4, a polygon 2 per po",
        ),
        ("0 10 5 10 4", "malformed box", "10 is not a part of the image: give --bbox-type real?"),
        ("0 0.5 0.5 nan 0.4", "non-finite box", "object 1"),
        ("0 0.5 0.5 0 0.4", "zero-area box", "object 1"),
        ("0 0.5 0.5 -0.1 0.4", "inverted box", "object 1"),
        ("0 0.9 0.5 0.5 0.4", "box outside the image", "object 1"),
    ],
)
def test_what_is_rejected(tmp_path: Path, label: str, reason: str, detail: str) -> None:
    [item] = converted(tmp_path, label)
    assert isinstance(item, Rejected)
    assert (item.id, item.source, item.reason) == ("images/y.jpg", "labels/y.txt", reason)
    assert detail in item.detail


@pytest.mark.parametrize(
    ("label", "what", "count", "objects"),
    [
        (None, "images without a label file: known to hold nothing", 1, ()),
        (BOX + BOX, "labels listed twice, taken once", 1, (OBJECT,)),
        ("1 0.5 0.5 0.5 0.4 0.87\n" * 2, "confidences, which are not read", 1, (OBJECT,)),
        ("1.0 0.25 0.3 0.75 0.7 0.75 0.3\n", "polygons read as the box around them", 1, (OBJECT,)),
        ("1 0.25 0.3 0.75 0.3 0.75 0.7 0.25 0.7\n", "polygons read as the box around them", 1, (OBJECT,)),
    ],
)
def test_what_is_counted(tmp_path: Path, label: str | None, what: str, count: int, objects: Any) -> None:
    *notes, sample = converted(tmp_path, label)
    assert what in {note.what for note in notes if isinstance(note, Note)}
    assert sample.objects == objects


def test_boxes_read_at_once_are_those_of_their_lines() -> None:
    """To the last bit; and what is no plain good box sends its file to the lines."""
    draw, names = Random(5), dict(enumerate(NAMES))
    rows: list[list[str]] = [
        [draw.choice(("0", "2", "3.0")), *(f"{draw.random():.6f}" for _ in range(4))] for _ in range(50)
    ]
    assert _parse_boxes(rows, names, None, 1.5) == [_parse_line(row, names, None, 1.5, []) for row in rows]
    for bad in (
        "4 .5 .5 .1 .1",
        "0.5 .5 .5 .1 .1",
        "1 .5 .5 .1",
        "1 .5 .5 .1 .1 .9",
        "1 .5 .5 .1 x",
        "1 .5 -1.6 .1 .1",
    ):
        lines = [*rows, bad.split()]
        assert _parse_boxes(lines, names, None, 1.5) is None, bad
    assert _parse_boxes([["1", ".5", ".5", ".1", "1.6"]], names, None, 1.5) is None
    assert _parse_boxes([], names, None, 1.5) is None


def test_an_empty_label_file_is_an_image_of_nothing(tmp_path: Path) -> None:
    for text in ("", "\n \n", "\ufeff"):
        [sample] = converted(tmp_path, text)
        assert sample.objects == ()


def test_keypoints_are_left_out_by_what_data_yaml_says(tmp_path: Path) -> None:
    """Box and three points of two numbers are as many numbers as a polygon of five points has."""
    yaml = "train: images\nkpt_shape: [3, 2]\nnames: [cat, dog]"
    *notes, sample = converted(tmp_path, "1 0.5 0.5 0.5 0.4 0.1 0.1 0.2 0.2 0.9 0.9", yaml)
    assert ([note.what for note in notes], sample.objects) == (["keypoints, which are not read"], (OBJECT,))


def test_boxes_in_pixels(tmp_path: Path) -> None:
    folder = lay_out(tmp_path, {"data.yaml": "train: images\nnames: [cat, dog]", "images/y.jpg": ""})
    lay_out(folder, {"labels/y.txt": "1 10 5 10 4"})
    [sample] = read_items(find(folder / "data.yaml", "train", bbox_type="real"))
    assert isinstance(sample, Sample)
    assert sample.objects == (OBJECT,)


def test_names_stay_as_they_are_written(tmp_path: Path) -> None:
    """YAML would read a class `no` as false and 007 as 7, and other loaders run the code that a tag names."""
    lay_out(tmp_path, {"images/y.jpg": "", "labels/y.txt": "0 0.5 0.5 0.5 0.4\n1 0.5 0.5 0.5 0.4\n2 0.5 0.5 0.1 0.1"})
    (tmp_path / "data.yaml").write_text("train: images\nnames: [no, 007, !!python/object/apply:os.getcwd ['x']]\n")
    with pytest.raises(ValueError, match="names must be texts"):
        find(tmp_path / "data.yaml", "train")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [no, 007, 'é']\n")
    [sample] = read_items(find(tmp_path / "data.yaml", "train"))
    assert isinstance(sample, Sample)
    assert [item.caption for item in sample.objects or ()] == ["no", "007", "é"]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("train: images\n", r"has no names: write names: \["),
        ("train: images\nnames: cat\n", "has no names"),
        ("train: images\nnames: [cat, [dog]]\n", "names must be texts, in a list or by whole number from 0"),
        ("train: images\nnames: {a: cat}\n", "names must be texts"),
        (
            "train: images\nnames: [cat, dog]\nnc: 3\n",
            "says that there are 3 classes, but names has 2: make them equal",
        ),
        ("val: images\ntest:\nnames: [cat]\n", "has the parts val: --split train must be one of them"),
        ("train: elsewhere\nnames: [cat]\n", "names elsewhere, which is not under .*: give --images"),
        ("train: labels\nnames: [cat]\n", "the part train has no images"),
        (
            "train: images/a\nnames: [cat]\n",
            r"no image of train has a label file: .*labels/a/x.txt or .*images/a/x.txt is",
        ),
        ("names: [cat\n", "is not YAML"),
        ("- a\n", "looks like plain text, not a data.yaml"),
        ("image,xmin,ymin\n", "looks like a CSV table, not a data.yaml with names"),
    ],
)
def test_what_stops_the_conversion(tmp_path: Path, yaml: str, message: str) -> None:
    lay_out(tmp_path, {"data.yaml": yaml, "images/a/x.jpg": "", "images/y.jpg": "", "labels/y.txt": BOX})
    with pytest.raises(ValueError, match=message):
        find(tmp_path / "data.yaml", "train")


def test_folders_that_do_not_say_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds none of data\.yaml, .*classes\.txt"):
        find(tmp_path, "train")
    with pytest.raises(ValueError, match="no does not exist"):
        find(tmp_path / "no", "train")
    lay_out(tmp_path, {"classes.txt": "cat", "images/train/x.jpg": "", "labels/train/x.txt": BOX})
    with pytest.raises(ValueError, match="has the part images/train, so --split first must name one of its parts"):
        find(tmp_path, "first")


def test_listed_images_that_are_not_there_are_rejected(tmp_path: Path) -> None:
    lines = "images/y.jpg\n/elsewhere/images/z.jpg\nimages/gone.jpg\n"
    lay_out(
        tmp_path,
        {"data.yaml": "train: a.txt\nnames: [cat, dog]", "a.txt": lines, "images/y.jpg": "", "labels/y.txt": BOX},
    )
    items: list[Any] = read_items(find(tmp_path / "data.yaml", "train"))
    assert [getattr(item, "reason", "") for item in items] == ["absolute path", "missing file", ""]


def test_images_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--images is the folder that the paths of data.yaml are relative to."""
    lay_out(tmp_path, {"data.yaml": "path: /gone\ntrain: images\nnames: [cat, dog]"})
    lay_out(tmp_path / "disk", {"images/y.jpg": "", "labels/y.txt": BOX})
    arguments = ["--annotations", tmp_path / "data.yaml", "--out", tmp_path / "out", "--split", "train"]
    with pytest.raises(SystemExit, match="give --images"):
        run_main(monkeypatch, "yolo", *arguments)
    run_main(monkeypatch, "yolo", *arguments, "--images", tmp_path / "disk")
    assert [sample.id for sample in read_samples(tmp_path / "out")] == ["images/y.jpg"]
