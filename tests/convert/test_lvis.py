"""LVIS instances: written and read back, by hand, and what goes wrong."""

from pathlib import Path
from typing import Any

import pytest
from convert_helpers import picture, read_items, write_json
from round_trip import assert_same, convert, draw_scenes, xywh

from convert import coco
from convert.annotated import read_coco
from convert.items import Note, Rejected
from convert.lvis import find
from recipe.records import INDEX_FILE, RECORDS_FILE, parse_index, read_records
from recipe.schema import Object, Sample, Searched

NAMES = ("aerosol_can", "bass_(musical_instrument)", "Band_Aid")


def category(number: int, name: str) -> dict[str, Any]:
    synonyms = [name, "spray_can"]
    return {
        "id": number,
        "name": name,
        "synonyms": synonyms,
        "def": "a thing",
        "frequency": "r",
        "synset": "thing.n.01",
    }


def test_a_set_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = draw_scenes(tmp_path, NAMES, folder="train2017/")
    images, annotations = [], []
    for number, scene in enumerate(scenes):
        url = f"http://images.cocodataset.org/{scene.path}"
        images.append({"id": number, "coco_url": url, "width": scene.width, "height": scene.height})
        images[-1] |= {"neg_category_ids": [3], "not_exhaustive_category_ids": [1]}
        for item in scene.objects:
            row = {"id": len(annotations) + 1, "image_id": number, "category_id": NAMES.index(item.caption) + 1}
            polygon = [0.0, 0.0, 5.0, 0.0, 5.0, 5.0]
            annotations.append({**row, "bbox": xywh(item.box), "area": 9.5, "segmentation": [polygon]})
    categories = [category(number, name) for number, name in enumerate(NAMES, start=1)]
    path = write_json(tmp_path / "v1.json", {"images": images, "annotations": annotations, "categories": categories})
    samples = convert(monkeypatch, tmp_path / "out", "lvis", "--annotations", path, "--images", tmp_path)
    assert_same(samples, scenes)
    assert {item.searched for item in samples} == {Searched((NAMES[2],), (NAMES[0],))}
    assert all(item.area == 9.5 for sample in samples for item in sample.objects or ())
    folder = tmp_path / "out/train"
    stored = list(read_records(folder / RECORDS_FILE, parse_index(folder / INDEX_FILE)))
    assert [item.searched for item in stored] == [item.searched for item in samples]
    inside = convert(monkeypatch, tmp_path / "in", "lvis", "--annotations", path, "--images", tmp_path / "train2017")
    assert inside == samples, "--images may be the folder itself"


V1 = {
    "info": {"year": 2020, "version": "1.0"},
    "images": [
        {
            "id": 391895, "width": 20, "height": 10, "license": 3, "date_captured": "2013-11-14 11:18:45",
            "flickr_url": "http://flickr.test/a.jpg", "coco_url": "http://images.cocodataset.org/val2017/000000391895.jpg",
            "neg_category_ids": [2, 3], "not_exhaustive_category_ids": [1],
        },
        {
            "id": 2, "width": 20, "height": 10, "coco_url": "http://images.cocodataset.org/train2017/000000000002.jpg",
            "neg_category_ids": [1], "not_exhaustive_category_ids": [],
        },
    ],
    "annotations": [
        {
            "id": 1, "image_id": 391895, "category_id": 1, "bbox": [1.5, 2, 3.25, 4], "area": 6.5,
            "segmentation": [[1.5, 2.0, 4.75, 2.0, 4.75, 6.0]],
        }
    ],
    "categories": [category(number, name) for number, name in enumerate(NAMES, start=1)],
    "licenses": [],
}  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("val2017/000000391895.jpg", "train2017/000000000002.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    return tmp_path


def test_as_the_set_is_published(tmp_path: Path, images: Path) -> None:
    found = find(coco.read_instances(write_json(tmp_path / "a.json", V1)), images)
    assert found.classes == list(NAMES)
    note, *samples = read_items(found)
    searched = [Searched((NAMES[1], NAMES[2]), (NAMES[0],)), Searched((NAMES[0],))]
    assert samples == [
        Sample("391895", picture(), 20, 10, (Object((1.5, 2, 4.75, 6), NAMES[0], area=6.5),), searched=searched[0]),
        Sample("2", picture(), 20, 10, (), searched=searched[1]),
    ]
    assert isinstance(note, Note)
    assert (note.count, note.what.partition(",")[0]) == (1, "images without annotations")


def test_version_05_has_names_of_2014(images: Path) -> None:
    """Its file_name is COCO_train2014_..., which no folder of 2017 holds."""
    entry = {**V1["images"][0], "file_name": "COCO_val2014_000000391895.jpg"}
    [sample] = read_items(find({**V1, "images": [entry]}, images))
    assert isinstance(sample, Sample)
    del entry["coco_url"]
    (images / entry["file_name"]).write_bytes(picture())
    [sample] = read_items(find({**V1, "images": [entry]}, images))
    assert isinstance(sample, Sample)


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({"neg_category_ids": [99]}, "unknown category", "neg_category_ids holds 99"),
        ({"not_exhaustive_category_ids": ["x"]}, "unknown category", "not_exhaustive_category_ids holds 'x'"),
        ({"neg_category_ids": 5}, "malformed record", "neg_category_ids is 5, not a list"),
        ({"coco_url": "http://images.cocodataset.org/val2017/5.jpg"}, "missing file", "val2017/5.jpg"),
        ({"coco_url": None}, "malformed record", "file_name"),
        ({"coco_url": "http://images.test/../5.jpg"}, "path leaves the image root", ""),
        ({"width": 21}, "wrong size", "stated 21x10"),
    ],
)
def test_a_bad_image_is_rejected_alone(images: Path, change: dict[str, Any], reason: str, detail: str) -> None:
    entries = [{**V1["images"][0], **change}, V1["images"][1]]
    items = read_items(find({**V1, "images": entries}, images))
    [rejected] = (item for item in items if isinstance(item, Rejected))
    assert (rejected.reason, detail in rejected.detail) == (reason, True)
    assert sum(isinstance(item, Sample) for item in items) == 1


def test_an_image_without_lists_is_searched_for_its_objects_alone(images: Path) -> None:
    entries = [dict(V1["images"][0]), V1["images"][1]]
    del entries[0]["neg_category_ids"], entries[0]["not_exhaustive_category_ids"]
    samples = [item for item in read_items(find({**V1, "images": entries}, images)) if isinstance(item, Sample)]
    assert [item.searched for item in samples] == [Searched(), Searched((NAMES[0],))]


def test_a_coco_file_is_sent_to_its_converter(images: Path) -> None:
    with pytest.raises(ValueError, match=r"^a: no image has neg_category_ids .*: use python -m convert\.coco$"):
        find({**V1, "images": [{"id": 1, "file_name": "a.jpg"}]}, images, source="a")
    with pytest.raises(ValueError, match=r"use python -m convert\.lvis if it is a file of LVIS$"):
        coco.find({**V1, "images": [{"id": 1, "coco_url": "a.jpg"}]}, images)


def test_masks_are_not_kept_in_memory(tmp_path: Path) -> None:
    """Unless the box is made from them."""
    rows = [{"bbox": [1, 1, 2, 2], "segmentation": [[1.0] * 6]}, {"bbox": [], "segmentation": [[1.0] * 6]}]
    path = write_json(tmp_path / "a.json", {"images": [], "annotations": rows, "categories": []})
    assert ["segmentation" in item for item in coco.read_instances(path)["annotations"]] == [False, True]


def test_the_truth_of_an_evaluation_keeps_the_lists(tmp_path: Path) -> None:
    entries = [{**V1["images"][0], "file_name": "a.jpg"}]
    truth = read_coco(write_json(tmp_path / "a.json", {**V1, "images": entries}))
    assert truth["a.jpg"].searched == Searched((NAMES[1], NAMES[2]), (NAMES[0],))


def test_half_a_letter_is_the_fault_of_its_record_alone(tmp_path: Path, images: Path) -> None:
    """Written as bytes that are not UTF-8, as some tools do."""
    text = write_json(tmp_path / "a.json", V1).read_bytes().replace(b"val2017/000000391895", b"val2017/\xed\xa0\x80")
    (tmp_path / "a.json").write_bytes(text)
    items = read_items(find(coco.read_instances(tmp_path / "a.json"), images))
    assert [item.reason for item in items if isinstance(item, Rejected)] == ["text beyond Unicode"]
    assert [item.id for item in items if isinstance(item, Sample)] == ["2"]
