"""Visual Genome: written and read back, by hand, and what goes wrong."""

from pathlib import Path
from typing import Any

import pytest
from convert_helpers import picture, read_items, write_json
from round_trip import Scene, assert_same, convert, draw_scenes

from convert.items import Rejected
from convert.visual_genome import find, iter_array
from recipe.schema import Object, Sample

HOST = "https://cs.stanford.edu/people/rak248"
DATA = [
    {"width": 20, "height": 10, "url": f"{HOST}/VG_100K_2/1.jpg", "image_id": 1, "coco_id": None, "flickr_id": None},
    {"width": 20, "height": 10, "url": f"{HOST}/VG_100K/2.jpg", "image_id": 2, "coco_id": 5, "flickr_id": 6},
]
REGIONS = [
    {
        "id": 1,
        "regions": [
            {
                "region_id": 1382, "width": 8, "height": 5, "image_id": 1, "phrase": "the clock is green in colour",
                "y": 2, "x": 4,
            },
            {
                "region_id": 1383, "width": 20, "height": 10, "image_id": 1, "phrase": "shade is along the street ",
                "y": 0, "x": 0,
            },
        ],
    },
    {"id": 2, "regions": []},
]  # fmt: skip
OBJECTS = [
    {
        "image_id": 1,
        "image_url": f"{HOST}/VG_100K_2/1.jpg",
        "objects": [
            {
                "synsets": ["table.n.01"], "h": 5, "object_id": 105, "merged_object_ids": [],
                "names": ["table", "desk"], "w": 8, "y": 2, "x": 4,
            },
            {
                "synsets": [], "h": 10, "object_id": 106, "merged_object_ids": [9], "names": ["street"],
                "w": 20, "y": 0, "x": 0,
            },
        ],
    }
]  # fmt: skip
ATTRIBUTES = [
    {
        "image_id": 1,
        "attributes": [
            {**OBJECTS[0]["objects"][0], "attributes": ["white", "wooden", "white"]},
            {**OBJECTS[0]["objects"][1]},
        ],
    }
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("VG_100K_2/1.jpg", "VG_100K/2.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(picture())
    return tmp_path


def read(folder: Path, annotations: Any, attributes: Any = None, data: Any = DATA, **boxes: Any) -> list[Any]:
    paths = [write_json(folder / f"{name}.json", value) for name, value in (("a", annotations), ("d", data))]
    more = None if attributes is None else write_json(folder / "attributes.json", attributes)
    return read_items(find(paths[0], folder, paths[1], more, **boxes))


def write_set(folder: Path, scenes: list[Scene], as_regions: bool) -> Path:
    data, entries, number = [], [], 0
    for image, scene in enumerate(scenes, start=1):
        data.append({"image_id": image, "url": f"{HOST}/{scene.path}", "width": scene.width, "height": scene.height})
        rows = []
        for item in scene.objects:
            number += 1
            x1, y1, x2, y2 = item.box
            if as_regions:
                rows.append({"region_id": number, "phrase": item.caption, "x": x1, "y": y1})
                rows[-1] |= {"width": x2 - x1, "height": y2 - y1}
            else:
                rows.append(
                    {"object_id": number, "names": [item.caption], "x": x1, "y": y1, "w": x2 - x1, "h": y2 - y1}
                )
        entries.append({"id": image, "regions": rows} if as_regions else {"image_id": image, "objects": rows})
    write_json(folder / "image_data.json", data)
    return write_json(folder / "set.json", entries)


@pytest.mark.parametrize("as_regions", [True, False])
def test_a_set_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_regions: bool) -> None:
    scenes = draw_scenes(tmp_path, ("a red cup on a table", "cup"), folder="VG_100K/")
    path = write_set(tmp_path, scenes, as_regions)
    samples = convert(monkeypatch, tmp_path / "out", "visual_genome", "--annotations", path, "--images", tmp_path)
    assert samples[2].objects is None, "nobody looked: it is not known to be empty"
    assert_same([*samples[:2], *samples[3:]], [*scenes[:2], *scenes[3:]])
    flat = convert(
        monkeypatch, tmp_path / "flat", "visual_genome", "--annotations", path, "--images", tmp_path / "VG_100K"
    )
    assert flat == samples


def test_regions_as_published(images: Path) -> None:
    objects = (
        Object((4, 2, 12, 7), "the clock is green in colour"),
        Object((0, 0, 20, 10), "shade is along the street"),
    )
    assert read(images, REGIONS) == [Sample("1", picture(), 20, 10, objects), Sample("2", picture(), 20, 10, None)]


@pytest.mark.parametrize(
    ("annotations", "attributes", "captions"),
    [
        (OBJECTS, None, ["table", "street"]),
        (OBJECTS, ATTRIBUTES, ["white wooden table", "street"]),
        (ATTRIBUTES, None, ["white wooden table", "street"]),
        (OBJECTS, [], ["table", "street"]),
    ],
)
def test_objects_with_attributes(images: Path, annotations: Any, attributes: Any, captions: list[str]) -> None:
    [sample] = read(images, annotations, attributes)
    assert [item.caption for item in sample.objects] == captions
    assert [item.box for item in sample.objects] == [(4, 2, 12, 7), (0, 0, 20, 10)]


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({"x": -5}, "box outside the image", "region 1382: "),
        ({"width": 0}, "zero-area box", "region 1382: "),
        ({"height": None}, "malformed box", "region 1382: None is not a number"),
        ({"phrase": 5}, "malformed record", "region 1382: phrase is 5"),
        ({"phrase": ""}, "empty caption", "region 1382: "),
    ],
)
def test_a_bad_region(images: Path, change: dict[str, Any], reason: str, detail: str) -> None:
    bad, good = REGIONS[0]["regions"]
    [item] = read(images, [{"id": 1, "regions": [{**bad, **change}, good]}])
    assert isinstance(item, Rejected)
    assert (item.id, item.source, item.reason) == ("1", "a.json: entry 0", reason)
    assert item.detail.startswith(detail)


def test_boxes_beyond_the_image_can_be_clipped(images: Path) -> None:
    bad, good = REGIONS[0]["regions"]
    *_, sample = read(images, [{"id": 1, "regions": [{**bad, "x": -5}, good]}], bad_boxes="drop")
    assert [item.box for item in sample.objects] == [(0, 2, 3, 7), (0, 0, 20, 10)]


@pytest.mark.parametrize("entry", [{"id": 9, "regions": []}, {"regions": []}])
def test_an_image_without_data(images: Path, entry: Any) -> None:
    [item] = read(images, [entry])
    assert (item.reason, "image_data.json has no image" in item.detail) == ("unknown image", True)


def test_another_file_gets_one_sentence(images: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.json is not Visual Genome's .*: entry 0 has the keys \['qas'\]$"):
        read(images, [{"qas": []}])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1}', "it is not an array"),
        ("[1]", "it holds '1', not an object"),
        ('[{"a": 1}', "ends or breaks at letter 9"),
        ('[{"a": 1} {"b": 2}]', "ends or breaks at letter 9"),
        ('[{"a": 1}] more', "ends or breaks at letter 9"),
        ('[{"a": }]', "Expecting value"),
        ("", "it is not an array"),
    ],
)
def test_arrays_that_are_not(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is not an array of mine") as raised:
        list(iter_array(tmp_path / "a.json", "an array of mine"))
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    "text", ["[]", " [ ] \n", '[{"a": 1}]', ' [\n {"a": [1]} ,\n {"b": "]"}\n] ', '\ufeff[{"a": "\u00e9"}]']
)
def test_arrays(tmp_path: Path, text: str) -> None:
    import json

    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    found = list(iter_array(tmp_path / "a.json", "an array"))
    assert [value for _, value in found] == [json.loads(part) for part, _ in found] == json.loads(text.lstrip("\ufeff"))
