"""ODVG lines: the round trip, a file as the format's own tools write it, and what can go wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import picture, read_items, read_rejected, read_samples, run_main, write_json
from round_trip import assert_same, convert, draw_scenes

from convert.items import Note, Rejected
from convert.odvg import find
from recipe.schema import Object, Sample

NAMES = ("cup", "fire hydrant", "Straße", "red_car")


@pytest.mark.parametrize("kind", ["category", "label", "grounding"])
def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    scenes = draw_scenes(tmp_path / "images", NAMES)
    lines = []
    for scene in scenes:
        objects = scene.objects
        line: dict[str, Any] = {"filename": scene.path, "height": scene.height, "width": scene.width}
        if kind == "grounding" and objects:
            regions = [{"bbox": list(item.box), "phrase": item.caption} for item in objects]
            line["grounding"] = {"caption": " . ".join(item.caption for item in objects), "regions": regions}
        else:
            labels = [NAMES.index(item.caption) for item in objects]
            instances = [{"bbox": list(item.box), "label": label} for item, label in zip(objects, labels, strict=True)]
            named = [{**row, "category": item.caption} for row, item in zip(instances, objects, strict=True)]
            line["detection"] = {"instances": instances if kind == "label" else named}
        lines.append(line)
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    label_map = write_json(tmp_path / "map.json", {str(label): name for label, name in enumerate(NAMES)})
    arguments = ["--annotations", path, "--images", tmp_path / "images"]
    arguments += ["--label-map", label_map] if kind == "label" else []
    assert_same(convert(monkeypatch, tmp_path / "out", "odvg", *arguments), scenes)
    assert read_rejected(tmp_path / "out") == []


def test_as_its_tools_write_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers or two decimals, a label map from "0", regions of one box or several."""
    (tmp_path / "good.jpg").write_bytes(picture())
    stated = {"filename": "good.jpg", "height": 10, "width": 20}
    regions = [
        {"bbox": [1, 2, 3, 4], "phrase": "a paper cover", "tokens_positive": [[0, 5]]},
        {"bbox": [[5, 6, 7, 8], [9, 1, 11.25, 3]], "phrase": "wire"},
    ]
    lines = [
        {**stated, "detection": {"instances": [{"bbox": [1.5, 2, 3, 4], "label": 1, "category": "cat"}]}},
        {**stated, "grounding": {"caption": "a wire hanger with a paper cover", "regions": regions}},
        {**stated, "detection": {"instances": []}},
        {**stated, "grounding": {"caption": "a dog", "regions": []}},
    ]
    path = tmp_path / "odvg.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--annotations", path, "--images", tmp_path, "--out", tmp_path / "out", "--split", "train"]
    run_main(monkeypatch, "odvg", *arguments)
    data, found = picture(), Object((1, 2, 3, 4), "a paper cover")
    wires = (Object((5, 6, 7, 8), "wire"), Object((9, 1, 11.25, 3), "wire"))
    assert read_samples(tmp_path / "out") == [
        Sample("odvg-000001", data, 20, 10, (Object((1.5, 2, 3, 4), "cat"),)),
        Sample("odvg-000002", data, 20, 10, (found, *wires)),
        Sample("odvg-000003", data, 20, 10, ()),
        Sample("odvg-000004", data, 20, 10, None),
    ]
    assert read_rejected(tmp_path / "out") == []


def converted(folder: Path, entry: Any, names: Any = None, **options: Any) -> list[Any]:
    (folder / "good.jpg").write_bytes(picture())
    path = write_json(folder / "train.jsonl", {"filename": "good.jpg", **entry})
    label_map = None if names is None else write_json(folder / "map.json", names)
    return read_items(find(path, folder, label_map, **options))


def instances(*items: Any) -> dict[str, Any]:
    return {"detection": {"instances": [{"bbox": [1, 2, 3, 4], **item} for item in items]}}


@pytest.mark.parametrize(
    ("entry", "names", "reason", "detail"),
    [
        (
            instances({"label": 3}),
            None,
            "unknown category",
            "instance 1 has the label 3 and no category: give --label-",
        ),
        (instances({"label": 3}), ["a"], "unknown category", "its label map has no such label"),
        (instances({"label": 0, "category": "b"}), ["a"], "unknown category", "is a 'b', but its label 0 is 'a'"),
        (instances({"category": 5}), None, "malformed record", "is 5, not text"),
        (instances({"category": " "}), None, "empty caption", ""),
        (instances({"category": "a", "bbox": [3, 4, 1, 2]}), None, "inverted box", "object 1"),
        (instances({"category": "a", "bbox": [1, 2, 3]}), None, "malformed box", "not four numbers"),
        ({"detection": {"instances": None}}, None, "malformed record", "detection lacks the list instances"),
        ({"detection": []}, None, "malformed record", "not a JSON object"),
        ({"grounding": {"regions": [{"bbox": [1, 2, 3, 4]}]}}, None, "malformed record", "phrase is None, not text"),
        ({"grounding": {"regions": [{"bbox": [], "phrase": "a"}]}}, None, "malformed box", ""),
        ({"grounding": {"caption": "a"}}, None, "malformed record", "lacks the list regions: it has the keys"),
        ({"objects": []}, None, "malformed record", "neither detection nor grounding, but the keys"),
        ({"filename": 7, **instances({"category": "a"})}, None, "malformed record", "filename is 7"),
        ({"height": 20, "width": 10, **instances({"category": "a"})}, None, "wrong size", "stated 10x20"),
    ],
)
def test_what_is_rejected(tmp_path: Path, entry: Any, names: Any, reason: str, detail: str) -> None:
    [item] = converted(tmp_path, entry, names)
    assert isinstance(item, Rejected)
    assert (item.reason, detail in item.detail) == (reason, True), item


def test_both_kinds_in_one_line_and_repetitions(tmp_path: Path) -> None:
    regions = [{"bbox": [[1, 2, 3, 4], [1, 2, 3, 4]], "phrase": ["a", "cup"]}]
    entry = {**instances({"category": "cup", "label": 0}), "grounding": {"caption": "a cup", "regions": regions}}
    *notes, sample = converted(tmp_path, entry, {"0": "cup"})
    assert sample.objects == (Object((1, 2, 3, 4), "cup"), Object((1, 2, 3, 4), "a cup"))
    assert [(note.what, note.count) for note in notes if isinstance(note, Note)] == [
        ("captions of whole images, which are not read", 1),
        ("objects listed twice, taken once", 1),
    ]


def test_fractions_are_not_taken_as_pixels(tmp_path: Path) -> None:
    entry = instances({"category": "cup", "bbox": [0.25, 0.2, 0.5, 0.5]})
    with pytest.raises(ValueError, match="all 1 boxes lie within 0 to 1"):
        converted(tmp_path, entry)
    [sample] = converted(tmp_path, entry, bbox_type="norm1")
    assert sample.objects == (Object((5, 2, 10, 5), "cup"),)


@pytest.mark.parametrize(
    ("names", "message"),
    [({"0": 5}, "is not a label map such as"), ("dog", "is not a label map"), ([""], "give each label its name")],
)
def test_a_label_map_that_is_none(tmp_path: Path, names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        converted(tmp_path, instances({"label": 0}), names)


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("label,name,more\n0,dog,x\n")
    with pytest.raises(ValueError, match="looks like a CSV table, not a label map"):
        find(tmp_path / "a.csv", tmp_path, tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"not JSON lines for convert\.odvg"):
        find(tmp_path / "a.csv", tmp_path)
    path = write_json(tmp_path / "a.jsonl", {"images": ["a.jpg"], "objects": []})
    with pytest.raises(ValueError, match=r"JSON lines of this recipe, .*: read it with python -m convert\.jsonl"):
        find(path, tmp_path)
