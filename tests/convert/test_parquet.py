"""Hugging Face's parquet: written and read back in each of its forms, in several files, and what goes wrong."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import picture, read_items
from round_trip import Scene, assert_same, convert, draw_scenes, xywh

from convert.items import Rejected
from convert.parquet import find, list_files
from recipe.records import CLASSES_FILE
from recipe.schema import Object, Sample

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

NAMES = ["red cup", "plate", "fork"]
LABEL = {"names": NAMES, "_type": "ClassLabel"}
VALUE = {"dtype": "float32", "_type": "Value"}
# As `datasets` 1 to 3, and 4 on, write the features of one set of objects.
FEATURES = {
    "Sequence of dict": {
        "feature": {"bbox": {"feature": VALUE, "length": 4, "_type": "Sequence"}, "category": LABEL},
        "_type": "Sequence",
    },
    "List of dict": {
        "feature": {"bbox": {"feature": VALUE, "length": 4, "_type": "List"}, "category": LABEL},
        "_type": "List",
    },
    "list": [{"bbox": {"feature": VALUE, "length": 4, "_type": "Sequence"}, "category": LABEL}],
    "dict of List": {
        "bbox": {"feature": {"feature": VALUE, "length": 4, "_type": "List"}, "_type": "List"},
        "category": {"feature": LABEL, "_type": "List"},
    },
}  # fmt: skip


def write(path: Path, rows: Sequence[dict[str, Any]], objects: Any = FEATURES["list"], group: int = 5) -> Path:
    table = pa.Table.from_pylist(list(rows))
    if objects is not None:
        info = {"info": {"features": {"image": {"_type": "Image"}, "objects": objects}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path


def to_rows(root: Path, scenes: Sequence[Scene], side_by_side: bool) -> list[dict[str, Any]]:
    rows = []
    for number, scene in enumerate(scenes):
        boxes, categories = [xywh(item.box) for item in scene.objects], [NAMES.index(x.caption) for x in scene.objects]
        pairs = zip(boxes, categories, strict=True)
        objects = {"bbox": boxes, "category": categories}
        listed = [{"bbox": box, "category": category} for box, category in pairs]
        image = {"bytes": (root / scene.path).read_bytes(), "path": scene.path}
        rows.append({"image_id": number, "image": image, "objects": objects if side_by_side else listed})
        rows[-1] |= {"width": scene.width, "height": scene.height}
    return rows


@pytest.mark.parametrize("form", FEATURES)
def test_a_set_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    scenes = draw_scenes(tmp_path / "images", NAMES, num_scenes=23)
    rows = to_rows(tmp_path / "images", scenes, side_by_side=form in ("Sequence of dict", "dict of List"))
    for number, part in enumerate((rows[:9], rows[9:])):
        write(tmp_path / f"data/train-{number:05d}-of-00002.parquet", part, FEATURES[form])
    write(tmp_path / "data/test-00000-of-00001.parquet", rows[:1], FEATURES[form])
    samples = convert(monkeypatch, tmp_path / "out", "parquet", "--annotations", tmp_path / "data")
    assert_same(samples, scenes)
    assert (tmp_path / "out" / "train" / CLASSES_FILE).read_text().splitlines() == NAMES
    assert [item.image for item in samples] == [(tmp_path / "images" / item.path).read_bytes() for item in scenes]
    assert [item.id for item in samples] == [str(number) for number in range(23)]


def row(*objects: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"image": {"bytes": picture(), "path": "a.jpg"}, "objects": list(objects), **more}


def test_what_a_row_may_hold(tmp_path: Path) -> None:
    """Texts for categories, areas and crowds; nothing found, nothing said."""
    rows = [
        row({"bbox": [1.0, 2.0, 3.0, 4.0], "label": " cup ", "area": 5.5, "iscrowd": False}, image_id="x"),
        row({"bbox": [0.0, 0.0, 20.0, 10.0], "label": "cups", "area": None, "iscrowd": True}, image_id="y"),
        {**row(image_id="z"), "objects": []},
        {**row(image_id="w"), "objects": None},
    ]
    path = write(tmp_path / "a.parquet", rows, None)
    samples = read_items(find(path, tmp_path, "train"))
    assert samples == [
        Sample("x", picture(), 20, 10, (Object((1, 2, 4, 6), "cup", False, 5.5),)),
        Sample("y", picture(), 20, 10, (Object((0, 0, 20, 10), "cups", True),)),
        Sample("z", picture(), 20, 10, ()),
        Sample("w", picture(), 20, 10, None),
    ]


@pytest.mark.parametrize(
    ("kind", "numbers"), [("xywh", [4, 2, 8, 6]), ("xyxy", [4, 2, 12, 8]), ("cxcywh", [8, 5, 8, 6])]
)
def test_box_formats(tmp_path: Path, kind: str, numbers: list[int]) -> None:
    path = write(tmp_path / "a.parquet", [row({"bbox": numbers, "category": 1})])
    [sample] = read_items(find(path, tmp_path, "train", kind))
    assert isinstance(sample, Sample)
    assert sample.objects == (Object((4, 2, 12, 8), "plate"),)
    [sample] = read_items(
        find(
            write(tmp_path / "b.parquet", [row({"bbox": [x / 20 for x in numbers], "category": 1})]),
            tmp_path,
            "train",
            kind,
            bbox_type="norm1",
        )
    )
    assert isinstance(sample, Sample)
    assert sample.objects is not None
    [item] = sample.objects
    assert item.box == pytest.approx((4, 1, 12, 4))


def test_images_by_path_or_as_bare_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture())
    by_path = [{"image": {"bytes": None, "path": name}, "objects": []} for name in ("a.jpg", "no.jpg")]
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("objects", pa.list_(pa.null()))]
    )
    pq.write_table(pa.Table.from_pylist(by_path, schema=schema), tmp_path / "a.parquet")
    sample, rejected = read_items(find(tmp_path / "a.parquet", tmp_path, "train"))
    assert isinstance(sample, Sample) and sample.image == picture()
    assert isinstance(rejected, Rejected) and rejected.reason == "missing file"
    path = write(tmp_path / "b.parquet", [{"image": picture(), "objects": []}], None)
    assert read_items(find(path, tmp_path, "train")) == [Sample("b-000001", picture(), 20, 10, ())]


@pytest.mark.parametrize(
    ("value", "reason", "detail"),
    [
        (row({"bbox": [1.0, 1.0, 2.0], "category": 1}), "malformed box", "is not four numbers"),
        (row({"category": 1, "x": 5}), "malformed box", "None is not four numbers"),
        (row({"bbox": [1.0, 1.0, 2.0, 2.0], "category": 3}), "unknown category", "3, and the features name 3 classes"),
        (row({"bbox": [1.0, 1.0, 2.0, 2.0], "category": None}), "unknown category", "None, and"),
        (row({"bbox": [1.0, 1.0, 2.0, 2.0], "category": 0}, width=9, height=10), "wrong size", "stated 9x10"),
        ({**row(), "image": {"bytes": b"no image", "path": "a.jpg"}}, "unreadable image", "a.jpg: "),
        ({**row(), "objects": {"bbox": [[1.0] * 4], "category": [1, 2]}}, "unequal lengths", "1 bbox, 2 category"),
    ],
)  # fmt: skip
def test_a_bad_row(tmp_path: Path, value: dict[str, Any], reason: str, detail: str) -> None:
    [item] = read_items(find(write(tmp_path / "a.parquet", [value]), tmp_path, "train", bbox_type="real"))
    assert isinstance(item, Rejected)
    assert (item.id, item.source, item.reason) == ("a-000001", "a.parquet: row 1", reason)
    assert detail in item.detail


def test_numbers_without_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [row({"bbox": [1.0, 1.0, 2.0, 2.0], "category": 0})], None)
    [item] = read_items(find(path, tmp_path, "train"))
    assert isinstance(item, Rejected)
    assert item.detail == "0, and the features name 0 classes: store names, or a ClassLabel"


def test_what_cannot_be_read_gets_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"img": [1], "boxes": [2]}), path)
    with pytest.raises(
        ValueError, match=r"lacks the columns \['image', 'objects'\], it has \['img', 'boxes'\]: rename"
    ):
        find(path, tmp_path, "train")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(ValueError, match=r"b\.parquet is not a parquet file"):
        find(tmp_path / "b.parquet", tmp_path, "train")
    with pytest.raises(ValueError, match=r"c\.parquet is not a parquet file"):
        find(tmp_path / "c.parquet", tmp_path, "train")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"^parquet files need pyarrow: pip install '\.\[parquet\]'$"):
        find(tmp_path / "d.parquet", tmp_path, "train")


def test_the_files_of_a_split(tmp_path: Path) -> None:
    names = [
        "data/test-00000-of-00001.parquet",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_files(tmp_path, "train") == [tmp_path / name for name in names[1:]]
    assert list_files(tmp_path / names[0], "train") == [tmp_path / names[0]], "a file is what was asked for"
    with pytest.raises(ValueError, match=r"no parquet file of --split val, only of test, train$"):
        list_files(tmp_path, "val")
    (tmp_path / "plain").mkdir()
    with pytest.raises(ValueError, match=r"has no parquet file of --split val$"):
        list_files(tmp_path / "plain", "val")
    (tmp_path / "plain/0001.parquet").touch()
    assert list_files(tmp_path / "plain", "val") == [tmp_path / "plain/0001.parquet"]


def test_two_processes_write_the_same(tmp_path: Path) -> None:
    """Workers are forked after a row group was read."""
    rows = [row({"bbox": [1.0, 1.0, 2.0 + number, 2.0], "category": 1}) for number in range(12)]
    path = write(tmp_path / "a.parquet", rows)
    from convert.write import convert_split

    for workers in (1, 2):
        found = find(path, tmp_path, "train")
        summary = convert_split(found, str(tmp_path / str(workers)), "train", num_workers=workers, part_records=4)
        assert (summary.samples, summary.parts) == (12, 3)
    files = [sorted(file.relative_to(tmp_path / n) for file in (tmp_path / n).rglob("*.mds")) for n in ("1", "2")]
    assert files[0] == files[1]
    assert all((tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes() for file in files[0])


def test_a_part_is_made_again_if_its_images_changed(tmp_path: Path) -> None:
    rows = [row({"bbox": [1.0, 1.0, 2.0, 2.0], "category": 1})]
    first, same = (find(write(tmp_path / "a.parquet", rows), tmp_path, "train").entries[0] for _ in range(2))
    assert first.fingerprint() == same.fingerprint()
    assert len(first.fingerprint()) < 400, "the image is hashed"
    rows[0]["image"]["bytes"] = picture(mode="L")
    (tmp_path / "other").mkdir()
    other = find(write(tmp_path / "other/a.parquet", rows), tmp_path, "train").entries[0]
    assert other.fingerprint() != first.fingerprint()
