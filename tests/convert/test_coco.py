"""COCO instances, by hand and on the real sets."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import picture, read_items, read_rejected, read_samples, run_main, write_json

from convert.coco import find, read_instances
from convert.items import Note, Rejected
from convert.write import convert_split
from recipe.records import CLASSES_FILE
from recipe.schema import Object, Sample


def annotation(number: int, image_id: Any, bbox: list[Any], **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image_id, "bbox": bbox, "category_id": 3, **more}


def image(number: int, name: str = "") -> dict[str, Any]:
    return {"id": number, "file_name": name or f"{number}.jpg", "width": 20, "height": 10}


INSTANCES = {
    "images": [image(7), image(9), image(11)],
    "annotations": [
        annotation(1, 7, [1, 2, 3.5, 4], area=10.5, iscrowd=0),
        annotation(2, 7, [0, 0, 20, 10], area=50, iscrowd=1),
        annotation(3, 9, [5, 5, 5, 5]),
    ],
    "categories": [{"id": 4, "name": "a unicorn"}, {"id": 3, "name": "cat"}],
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in (7, 8, 9, 11):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(picture())
    return tmp_path / "images"


def test_by_hand(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_json(tmp_path / "instances.json", INSTANCES)
    run_main(
        monkeypatch, "coco", "--annotations", path, "--images", images, "--out", tmp_path / "out", "--split", "train"
    )
    data = picture()
    objects = (Object((1, 2, 4.5, 6), "cat", False, 10.5), Object((0, 0, 20, 10), "cat", True, 50))
    assert read_samples(tmp_path / "out") == [
        Sample("7", data, 20, 10, objects),
        Sample("9", data, 20, 10, (Object((5, 5, 10, 10), "cat"),)),
        Sample("11", data, 20, 10, ()),
    ]
    assert read_rejected(tmp_path / "out") == []
    assert (tmp_path / "out" / "train" / CLASSES_FILE).read_text() == "a unicorn\ncat\n", "without an object, too"


def test_names_that_no_list_can_hold_make_none(images: Path) -> None:
    """Phrases are open captions; a name of two lines would be two classes."""
    items = find({**INSTANCES, "categories": [{"id": 3, "name": "a\ncat"}]}, images)
    convert_split(items, str(images.parent / "out"), "train")
    assert not (images.parent / "out" / "train" / CLASSES_FILE).exists()
    regions = write_json(images / "regions.json", {"regions": [{"annotation_id": 3, "phrase": "a sleeping cat"}]})
    assert (find(INSTANCES, images).classes, find(INSTANCES, images, regions).classes) == (["a unicorn", "cat"], [])


def test_phrases(tmp_path: Path, images: Path) -> None:
    regions = [
        {"annotation_id": 3, "phrase": " a sleeping cat "},
        {"annotation_id": 3, "phrase": "another"},
        {"annotation_id": 99, "phrase": "nobody"},
        {"annotation_id": 1, "phrase": None},
        {"phrase": "of nothing"},
    ]
    found = read_items(find(INSTANCES, images, write_json(tmp_path / "regions.json", {"regions": regions})))
    captions = [item.caption for sample in found if isinstance(sample, Sample) for item in sample.objects or ()]
    assert captions == ["cat", "cat", "a sleeping cat"]
    assert [item.count for item in found if isinstance(item, Note)] == [1]
    rejected = [(item.id, item.source, item.reason) for item in found if isinstance(item, Rejected)]
    assert rejected == [
        ("99", "regions.json: region 2", "phrase of an unknown annotation"),
        ("1", "regions.json: region 3", "malformed phrase"),
        ("", "regions.json: region 4", "phrase of an unknown annotation"),
    ]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (annotation(4, 7, [1, 1, 2, 2], category_id=8), "unknown category"),
        (annotation(4, 7, [1, 1, 2, 2], category_id=None), "unknown category"),
        (annotation(4, 7, [1, 1, -2, 2]), "inverted box"),
        (annotation(4, 7, [1, 1, 0, 2]), "zero-area box"),
        (annotation(4, 7, [1, 1, float("nan"), 2]), "non-finite box"),
        (annotation(4, 7, [1, 1, 30, 2]), "box outside the image"),
        (annotation(4, 7, [1, 1, 2]), "malformed box"),
        (annotation(4, 7, [1, 1, 2, 2], iscrowd="maybe"), "malformed flag"),
    ],
)
def test_bad_annotation_rejects_its_image_only(images: Path, bad: dict[str, Any], reason: str) -> None:
    found = read_items(find({**INSTANCES, "annotations": [*INSTANCES["annotations"], bad]}, images))
    [item] = (item for item in found if isinstance(item, Rejected))
    assert (item.id, item.reason, item.detail.startswith("annotation 4: ")) == ("7", reason, True)
    assert [item.id for item in found if isinstance(item, Sample)] == ["9", "11"]


@pytest.mark.parametrize("image_id", [8, None, [7]])
def test_annotation_of_no_image_is_counted(images: Path, image_id: Any) -> None:
    orphan = annotation(4, image_id, [1, 1, 2, 2])
    found = read_items(find({**INSTANCES, "annotations": [*INSTANCES["annotations"], orphan]}, images))
    assert [(item.id, item.reason) for item in found if isinstance(item, Rejected)] == [("4", "unknown image")]
    assert sum(isinstance(item, Sample) for item in found) == 3


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (image(8, "none.jpg"), "missing file"),
        (image(8, "../instances.json"), "path leaves the image root"),
        ({"id": 8}, "malformed record"),
        ({"id": None, "file_name": "7.jpg"}, "malformed record"),
        ("good.jpg", "malformed record"),
        ({**image(8), "width": 10}, "wrong size"),
    ],
)
def test_bad_image(images: Path, bad: Any, reason: str) -> None:
    found = read_items(find({**INSTANCES, "images": [*INSTANCES["images"], bad]}, images))
    assert [item.reason for item in found if isinstance(item, Rejected)] == [reason]


def test_images_without_id_are_no_duplicates(images: Path) -> None:
    found = read_items(find({**INSTANCES, "images": [{"file_name": "7.jpg"}] * 2, "annotations": []}, images))
    assert [item.reason for item in found if isinstance(item, Rejected)] == ["malformed record"] * 2


def test_file_that_is_not_coco(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"lacks the lists \['annotations', 'categories'\]"):
        read_instances(write_json(tmp_path / "a.json", {"images": []}))
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_instances(tmp_path / "b.json")
    with pytest.raises(ValueError, match="lacks an id or a name"):
        read_items(find({**INSTANCES, "categories": [{"id": 3}]}, images))
    with pytest.raises(SystemExit, match=r"^error: .*no does not exist: give a COCO file"):
        run_main(
            monkeypatch, "coco", "--annotations", tmp_path / "no", "--images", images, "--out", "o", "--split", "s"
        )


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "pictures", "boxes", "crowd", "empty", "classes"),
    [
        ("coco_cc_train", 78, 744, 9, 1, 80),
        ("chess_train", 100, 1001, 0, 0, 12),
        ("wagon_train", 110, 423, 0, 0, 2),
        ("bccd_trainval", 292, 3941, 0, 0, 3),
    ],
)
def test_real_sets_lose_nothing(
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    pictures: int,
    boxes: int,
    crowd: int,
    empty: int,
    classes: int,
) -> None:
    folder = shared_data / name
    path = folder / "instances.json"
    arguments = ["--annotations", path, "--images", folder / "images", "--out", tmp_path, "--split", "train"]
    run_main(monkeypatch, "coco", *arguments, "--strict")
    samples = read_samples(tmp_path)
    objects = [item for sample in samples for item in sample.objects or ()]
    assert (len(samples), len(objects), sum(item.iscrowd for item in objects)) == (pictures, boxes, crowd)
    assert sum(sample.objects == () for sample in samples) == empty
    truth = json.loads(path.read_text())
    categories = {category["id"]: category["name"] for category in truth["categories"]}
    assert len(categories) == classes
    names = Counter(categories[item["category_id"]] for item in truth["annotations"])
    assert Counter(item.caption for item in objects) == names
    files = {str(item["id"]): item["file_name"] for item in truth["images"]}
    assert all(sample.image == (folder / "images" / files[sample.id]).read_bytes() for sample in samples)
    for sample in samples:
        expected = [item for item in truth["annotations"] if str(item["image_id"]) == sample.id]
        for item, row in zip(sample.objects or (), expected, strict=True):
            x, y, width, height = row["bbox"]
            assert item.box == pytest.approx((x, y, x + width, y + height))
            assert (item.caption, item.iscrowd) == (categories[row["category_id"]], bool(row.get("iscrowd", 0)))
            assert item.area == row.get("area")


@pytest.mark.shared_data
def test_real_phrases(shared_data: Path) -> None:
    folder = shared_data / "coco_cc_train"
    regions = json.loads((folder / "regions.json").read_text())["regions"]
    first: dict[int, str] = {}
    for region in regions:
        first.setdefault(region["annotation_id"], region["phrase"])
    assert (len(regions), len(first)) == (62, 61)
    plain = read_items(find(read_instances(folder / "instances.json"), folder / "images"))
    found = read_items(find(read_instances(folder / "instances.json"), folder / "images", folder / "regions.json"))
    assert [item.count for item in found if isinstance(item, Note)] == [1]
    pairs = [
        (old.caption, new.caption)
        for before, after in zip(plain, found[1:], strict=True)
        for old, new in zip(before.objects, after.objects, strict=True)  # pyright: ignore
    ]
    assert sorted(new for old, new in pairs if old != new) == sorted(first.values())
