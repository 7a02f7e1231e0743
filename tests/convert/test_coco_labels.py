"""COCO files as they occur: ids of several types or owners, flags and numbers as text, masks, bad boxes, fractions."""

from pathlib import Path
from typing import Any

import pytest
from convert_helpers import picture, read_items, read_rejected, read_samples, run_main, write_json

from convert.annotated import read_coco, read_image_ids
from convert.coco import find
from convert.items import Note, Rejected
from recipe.schema import Object, Sample


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """`1.jpg`, `2.jpg` and `deep/3.jpg`, each 40 x 20."""
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name in ("1.jpg", "2.jpg", "deep/3.jpg"):
        (tmp_path / "images" / name).write_bytes(picture((40, 20)))
    return tmp_path / "images"


def instances(*annotations: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Two images and these annotations, by default a cat at (5, 5, 15, 15) of image 1, then of image 2."""
    base = [{"id": 10 + n, "image_id": n, "category_id": 1, "bbox": [5, 5, 10, 10]} for n in (1, 2)]
    filled = [{**base[min(n, 1)], "id": 11 + n, **annotation} for n, annotation in enumerate(annotations or base)]
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2)]
    return {"images": images, "annotations": filled, "categories": [{"id": 1, "name": "cat"}], **more}


def samples_of(items: list[Any]) -> dict[str, tuple[Object, ...] | None]:
    return {item.id: item.objects for item in items if isinstance(item, Sample)}


def rejected_of(items: list[Any]) -> list[tuple[str, str, str]]:
    return [(item.id, item.reason, item.detail) for item in items if isinstance(item, Rejected)]


def notes_of(items: list[Any]) -> list[str]:
    return [item.what for item in items if isinstance(item, Note)]


CAT = Object((5, 5, 15, 15), "cat")


@pytest.mark.parametrize("forms", [(1, "1"), ("1", 1), (1.0, 1), ("1.0", 1), (" 1", 1), (1, 1.0), ("1.00", "1")])
def test_ids_are_compared_by_value(images: Path, forms: tuple[Any, Any]) -> None:
    here, there = forms
    first, second = instances()["annotations"]
    value = instances(
        {**first, "image_id": there, "category_id": there, "id": here},
        second,
        images=[{"id": here, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        categories=[{"id": here, "name": "cat"}],
    )
    second["category_id"] = there
    regions = write_json(images.parent / "regions.json", {"regions": [{"annotation_id": there, "phrase": "a tabby"}]})
    items = read_items(find(value, images, regions))
    assert samples_of(items) == {"1": (Object((5, 5, 15, 15), "a tabby"),), "2": (CAT,)}
    assert rejected_of(items) == []
    path = write_json(images / "truth.json", value)
    assert read_coco(path)["1.jpg"].objects == (CAT,)


def test_other_texts_are_other_ids(images: Path) -> None:
    """And an image without annotations may be the one they were meant for: it is not stored as empty."""
    value = instances({"image_id": "1"}, {"image_id": 1}, {"image_id": "02"})
    items = read_items(find(value, images))
    assert rejected_of(items) == [("13", "unknown image", "image_id '02'")]
    assert samples_of(items) == {"1": (CAT, CAT), "2": None}
    assert notes_of(items) == ["images not known to be empty, since annotations belong to no image"]
    assert read_coco(write_json(images / "truth.json", value))["2.jpg"].objects is None


def test_a_file_of_orphans_stops(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = instances({"image_id": "img-1"}, {"image_id": "img-2"}, {"image_id": 1})
    with pytest.raises(ValueError, match=r"2 of 3 annotations belong to no image \(the first has image_id 'img-1'"):
        find(value, images)
    path = write_json(images / "a.json", value)
    with pytest.raises(ValueError, match="belong to no image"):
        read_coco(path)
    with pytest.raises(SystemExit, match="belong to no image"):
        run_main(
            monkeypatch, "coco", "--annotations", path, "--images", images, "--out", tmp_path / "o", "--split", "s"
        )
    assert not (tmp_path / "o").exists()


def test_annotation_id_zero_has_a_label(images: Path) -> None:
    value = instances({"image_id": 1}, {"image_id": 2}, {"id": 0, "image_id": 9})
    assert [item[0] for item in rejected_of(read_items(find(value, images)))] == ["0"]
    value = instances({"image_id": 1, "id": 0, "bbox": [1, 1, 0, 5]})
    assert rejected_of(read_items(find(value, images)))[0][2].startswith("annotation 0: ")


def test_an_id_of_several_files_rejects_them_all(images: Path) -> None:
    """Also the file that has an id of its own besides: its other annotations are lost."""
    entries = [(1, "1.jpg"), ("1", "2.jpg"), (2, "2.jpg"), (3, "deep/3.jpg")]
    value = instances(images=[{"id": key, "file_name": name} for key, name in entries])
    items = read_items(find(value, images))
    assert [(label, reason) for label, reason, _ in rejected_of(items)] == [
        ("1", "duplicate id"),
        ("1", "duplicate id"),
        ("2", "duplicate id"),
    ]
    assert "id 1 is that of 1.jpg and 2.jpg" in rejected_of(items)[0][2]
    assert samples_of(items) == {"3": ()}


def test_a_file_of_several_ids_is_one_image(images: Path) -> None:
    entries = [(1, "deep/3.jpg"), (2, "deep\\3.jpg"), (4, "./deep/3.jpg"), (5, "1.jpg")]
    value = instances(
        {"image_id": 1},
        {"image_id": 2},
        {"image_id": 4, "bbox": [0, 0, 40, 20]},
        images=[{"id": key, "file_name": name} for key, name in entries],
    )
    items = read_items(find(value, images))
    assert samples_of(items) == {"1": (CAT, Object((0, 0, 40, 20), "cat")), "5": ()}
    assert notes_of(items) == ["image files of several entries: merged"]
    value["images"][0] |= {"width": 40, "height": 20}
    value["images"][1] |= {"width": 20, "height": 40}
    assert [row[1] for row in rejected_of(read_items(find(value, images)))] == ["wrong size"]


def test_phrases_of_an_id_that_several_annotations_share(images: Path) -> None:
    regions = [{"annotation_id": key, "phrase": "a tabby"} for key in (7, "7", 8)]
    path = write_json(images.parent / "regions.json", {"regions": regions})
    value = instances({"image_id": 1, "id": 7}, {"image_id": 2, "id": "7"}, {"image_id": 2, "id": 8})
    items = read_items(find(value, images, path))
    assert [item.caption for objects in samples_of(items).values() for item in objects or ()] == [
        "cat",
        "cat",
        "a tabby",
    ]
    text = "2 annotations have the id 7: give each its own"
    assert rejected_of(items) == [("7", "phrase of several annotations", text)] * 2


def test_an_annotation_that_is_listed_twice_is_one(images: Path) -> None:
    value = instances({"image_id": 1, "id": 7}, {"image_id": 1, "id": 7}, {"image_id": 2, "id": 8})
    path = write_json(images.parent / "r.json", {"regions": [{"annotation_id": 7, "phrase": "a tabby"}]})
    items = read_items(find(value, images, path))
    assert [len(objects or ()) for objects in samples_of(items).values()] == [1, 1]
    assert notes_of(items) == ["annotations listed twice: the first is kept"]
    assert samples_of(items)["1"] == (Object((5, 5, 15, 15), "a tabby"),)


def test_categories_that_share_an_id_are_refused(images: Path) -> None:
    categories = [{"id": 1, "name": "cat"}, {"id": "1", "name": "dog"}]
    with pytest.raises(ValueError, match="the categories 'cat' and 'dog' share the id 1"):
        find(instances(categories=categories), images)


@pytest.mark.parametrize("name", ["iscrowd", "ignore"])
@pytest.mark.parametrize(
    ("value", "crowd"),
    [("0", False), ("false", False), (0.0, False), (None, False), ("", False), ("1", True), (True, True), (1.0, True)],
)
def test_flags_are_read_by_meaning(images: Path, name: str, value: Any, crowd: bool) -> None:
    items = read_items(find(instances({"image_id": 1, name: value}), images))
    assert [item.iscrowd for item in samples_of(items)["1"] or ()] == [crowd]


@pytest.mark.parametrize("value", ["maybe", 2, -1, [0], float("nan")])
def test_a_flag_that_means_nothing_is_rejected(images: Path, value: Any) -> None:
    items = read_items(find(instances({"image_id": 1, "ignore": value}), images))
    assert [(label, reason) for label, reason, _ in rejected_of(items)] == [("1", "malformed flag")]


@pytest.mark.parametrize(
    ("value", "area"),
    [("90", 90.0), (90, 90.0), ("", None), (None, None), ("n/a", None), (-3, None), ([1], None), (float("inf"), None)],
)
def test_areas_are_read_by_meaning(images: Path, value: Any, area: float | None) -> None:
    items = read_items(find(instances({"image_id": 1, "area": value}), images))
    assert [item.area for item in samples_of(items)["1"] or ()] == [area]
    assert bool(notes_of(items)) == (area is None and value not in (None, ""))


@pytest.mark.parametrize(
    "size", [(0, 0), (None, None), ("", ""), ("0", "0"), (-1, -1), (40, 0), ("40", "20"), ("?", 20)]
)
def test_a_size_that_is_not_known(images: Path, size: tuple[Any, Any]) -> None:
    value = instances()
    value["images"][0] |= {"width": size[0], "height": size[1]}
    assert samples_of(read_items(find(value, images)))["1"] == (CAT,)


def test_a_size_that_is_known_is_checked(images: Path) -> None:
    value = instances()
    value["images"][0] |= {"width": "20", "height": "40"}
    assert [row[:2] for row in rejected_of(read_items(find(value, images)))] == [("1", "wrong size")]


def test_the_box_of_polygons(images: Path) -> None:
    polygons = [[5, 5, 9, 5, 7, 12], [9, 9, 15, 15, 10, 11, 9, 10]]
    value = instances({"image_id": 1, "bbox": None, "segmentation": polygons}, {"bbox": [], "segmentation": polygons})
    assert samples_of(read_items(find(value, images))) == {"1": (CAT,), "2": (CAT,)}


@pytest.mark.parametrize("mask", [None, [], {"counts": [1], "size": [40, 20]}, [[1, 2, 3]], [5], [["a"] * 6]])
def test_no_box_and_no_polygon(images: Path, mask: Any) -> None:
    value = instances({"image_id": 1, "bbox": None, "segmentation": mask})
    [(label, reason, detail)] = rejected_of(read_items(find(value, images)))
    assert (label, reason, detail.startswith("annotation 11: ")) == ("1", "malformed box", True)


BOXES = [
    ([5, 5, 0, 10], "zero-area box", None),
    ([15, 5, -10, 10], "inverted box", None),
    ([50, 5, 10, 10], "box outside the image", None),
    ([5, 5, float("nan"), 10], "non-finite box", None),
    ([-9, 5, 20, 100], "box outside the image", (0, 5, 11, 20)),
    ([30, -2, 20, 10], "box outside the image", (30, 0, 40, 8)),
]


@pytest.mark.parametrize(("bbox", "reason", "left"), BOXES)
def test_bad_boxes(images: Path, bbox: list[float], reason: str, left: Any) -> None:
    value = instances({"image_id": 1}, {"image_id": 1, "id": "x9", "bbox": bbox})
    [(_, found, detail)] = rejected_of(read_items(find(value, images)))
    assert (found, detail.startswith("annotation x9: ")) == (reason, True)
    items = read_items(find(value, images, bad_boxes="drop"))
    assert rejected_of(items) == []
    assert [item.box for item in samples_of(items)["1"] or ()] == [CAT.box, *([left] if left else [])]
    [note] = (item for item in items if isinstance(item, Note))
    assert note.what == ("box beyond the image clipped" if left else f"box left out: {reason}")
    assert note.examples == ("1: annotation x9",)


def test_an_image_that_loses_all_its_boxes_is_not_known_to_be_empty(images: Path) -> None:
    items = read_items(find(instances({"image_id": 1, "bbox": [5, 5, 0, 3]}), images, bad_boxes="drop"))
    assert [(label, reason) for label, reason, _ in rejected_of(items)] == [("1", "zero-area box")]
    assert samples_of(items) == {"2": ()}


def test_boxes_in_parts_of_the_image(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(value: dict[str, Any], *options: str) -> list[Any]:
        path = write_json(tmp_path / "a.json", value)
        target = ["--out", tmp_path / "o", "--split", "s", "--overwrite"]
        run_main(monkeypatch, "coco", "--annotations", path, "--images", images, *target, *options)
        return [[item.box for item in sample.objects or ()] for sample in read_samples(tmp_path / "o", "s")]

    fractions = instances({"image_id": 1, "bbox": [0.1, 0.25, 0.5, 0.5], "area": 0.25}, {"bbox": [0, 0, 1, 1]})
    with pytest.raises(SystemExit, match=r"all 2 boxes lie within 0 to 1: .* --bbox-type norm1, else"):
        convert(fractions)
    assert convert(fractions, "--bbox-type", "norm1") == [[(4, 5, 24, 15)], [(0, 0, 40, 20)]]
    assert [item.area for sample in read_samples(tmp_path / "o", "s") for item in sample.objects or ()] == [None, None]
    assert convert(fractions, "--bbox-type", "real")[1] == [(0, 0, 1, 1)]
    with pytest.raises(SystemExit, match="lie within 0 to 1"):
        convert(fractions, "--bbox-type", "norm1000")
    thousandths = instances({"image_id": 1, "bbox": [100, 250, 500, 500]}, {"bbox": [0, 0, 1000, 1000]})
    assert convert(thousandths, "--bbox-type", "norm1000") == [[(4, 5, 24, 15)], [(0, 0, 40, 20)]]
    with pytest.raises(ValueError, match=r"write the boxes of .* in pixels"):
        read_coco(write_json(images / "truth.json", fractions))


def test_one_small_box_among_ordinary_ones_is_kept(images: Path) -> None:
    items = read_items(find(instances({"image_id": 1, "bbox": [0, 0, 1, 1]}, {}), images))
    assert samples_of(items) == {"1": (Object((0, 0, 1, 1), "cat"),), "2": (CAT,)}


def test_the_options_are_part_of_what_a_restart_compares(images: Path) -> None:
    options = [{}, {"bbox_type": "norm1"}, {"bbox_type": "norm1000"}, {"bad_boxes": "drop"}]
    prints = {find(instances(), images, **option).entries[0].fingerprint() for option in options}
    assert len(prints) == len(options)


def test_the_summary_names_what_was_dropped(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = [{"image_id": 2, "id": number, "bbox": [5, 5, 0, 3]} for number in range(20, 27)]
    path = write_json(tmp_path / "a.json", instances({"image_id": 1}, {"image_id": 2}, *flat))
    target = ["--out", tmp_path / "o", "--split", "train", "--bad-boxes", "drop", "--strict"]
    run_main(monkeypatch, "coco", "--annotations", path, "--images", images, *target)
    text = "7  box left out: zero-area box (2: annotation 20, 2: annotation 21, 2: annotation 22, 2: annotation 23, "
    assert text + "2: annotation 24, ...)" in capsys.readouterr().out
    assert read_rejected(tmp_path / "o") == []


def test_names_with_backslashes(images: Path) -> None:
    value = instances({"image_id": 1}, images=[{"id": 1, "file_name": "deep\\3.jpg"}])
    assert samples_of(read_items(find(value, images))) == {"1": (CAT,)}
    (images / "deep\\3.jpg").write_bytes(picture((20, 20)))
    [sample] = read_items(find(value, images))
    assert isinstance(sample, Sample)
    assert sample.width == 20, "a file of exactly this name comes first"


def test_images_without_file_name_get_one_sentence(images: Path) -> None:
    entries = [{"id": n, "coco_url": f"http://images.test/{n}.jpg"} for n in (1, 2)]
    with pytest.raises(
        ValueError, match=r"^lvis\.json: no image has a file_name: add the path of its file to each, or use"
    ):
        find(instances(images=entries), images, source="lvis.json")


def test_ids_of_a_test_split(tmp_path: Path) -> None:
    entries = [{"id": "5", "file_name": "a.jpg"}, {"id": 6, "file_name": "b.jpg"}]
    assert read_image_ids(write_json(tmp_path / "a.json", {"images": entries})) == {"a.jpg": "5", "b.jpg": 6}
    entries[1]["id"] = 5
    with pytest.raises(ValueError, match=r"gives a\.jpg and b\.jpg the same id 5"):
        read_image_ids(write_json(tmp_path / "a.json", {"images": entries}))
    entries[1]["id"] = 6
    entries.append({"id": 7, "file_name": "b.jpg"})
    with pytest.raises(ValueError, match=r"gives b\.jpg the ids 6 and 7"):
        read_image_ids(write_json(tmp_path / "a.json", {"images": entries}))
