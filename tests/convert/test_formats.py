"""What is said of a file that a converter does not read, and the lines of a file that are not held in memory."""

import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import picture, read_items

from convert.coco import find as find_coco
from convert.coco import read_instances
from convert.formats import describe_other, look_at, refuse_other
from convert.jsonl import find
from convert.voc import find as find_voc

COCO = {"info": {"description": "x" * 70_000}, "images": [], "annotations": [], "categories": []}
TURNS = [{"from": "human", "value": '[{"bbox_2d": [1, 2, 3, 4]}]'}]
LOOKS: list[tuple[Any, str, str]] = [
    (COCO, "COCO instances", "coco"),
    ({**COCO, "images": [{"not_exhaustive_category_ids": []}]}, "LVIS", "lvis"),
    ([{"image": "a.jpg", "conversations": TURNS}], "a chat", "chat"),
    ({"filename": "a.jpg", "detection": {"instances": []}}, "ODVG", "odvg"),
    ({"images": ["a.jpg"], "objects": [], "annotations": 1}, "JSON lines of this recipe", "jsonl"),
    ([{"id": 1, "regions": [{"region_id": 2, "phrase": "a"}]}], "Visual Genome", "visual_genome"),
    ([{"ref_id": 1, "sentences": []}], "RefCOCO", "refcoco"),
    ({"version": "5", "shapes": [], "imagePath": "a.jpg"}, "LabelMe's JSON", ""),
    ([{"data": {}, "annotations": [{"result": []}]}], "Label Studio's own JSON (it exports COCO and YOLO too)", ""),
    ([{"image_id": 1, "category_id": 2, "score": 0.5}], "COCO results, which are predictions", ""),
    ({"a": 1, "b": {"c": 2}}, "JSON with the keys a, b, c", ""),
    ([1, 2], "JSON with the keys (none)", ""),
    ("image,xmin,ymin\na.jpg,1,2\n", "a CSV table", ""),
    ("image;xmin;ymin\n", "a CSV table", ""),
    ("<annotation><object/></annotation>", "one file of Pascal VOC, of which the folder is given", "voc"),
    ("<?xml version='1.0'?><annotations/>", "XML", ""),
    ("# comment\npath: .\nnames: [a]\n", "YOLO's description of a data set", "yolo"),
    ("classes = 2\nnames = obj.names\n", "YOLO's description of a data set", "yolo"),
    ("0 0.5 0.5 0.1 1e-1\n1 0.5 0.5 0.1 0.1 0.9\n", "YOLO labels, of which data.yaml or the folder", "yolo"),
    ("", "an empty file", ""),
    ("hello\n", "plain text", ""),
    (b"PAR1\x15\x04", "parquet", "parquet"),
    (pickle.dumps([{"ref_id": 1}]), "a pickle", "refcoco"),
    (b"PK\x03\x04\0", "a zip file: unpack it", ""),
    (picture(), "a binary file", ""),
]


def write(path: Path, content: Any) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(("content", "what", "reader"), LOOKS, ids=[f"{look[1][:20]}" for look in LOOKS])
def test_what_a_file_looks_like(tmp_path: Path, content: Any, what: str, reader: str) -> None:
    found = look_at(write(tmp_path / "file", content))
    assert (found[0].startswith(what), found[1]) == (True, reader), found
    sentence = describe_other(tmp_path / "file", "a COCO file")
    assert len(sentence.splitlines()) == 1
    assert "python -m convert" in sentence


def test_the_reader_or_the_formats_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a", "<annotation/><annotation>")
    assert describe_other(path, "a COCO file").endswith("not a COCO file: read it with python -m convert.voc")
    path = write(tmp_path / "b", "image,xmin,ymin\n")
    assert "looks like a CSV table, not a COCO file: make it one of the formats" in describe_other(path, "a COCO file")
    assert "(coco, " in describe_other(path, "a COCO file")


@pytest.mark.parametrize("content", ["a,b,c\n1,2,3\n", "<annotation>", COCO, [{"score": 1}, 2], {"a": 1}, ""])
def test_every_reader_refuses_other_files_in_one_sentence(tmp_path: Path, content: Any) -> None:
    path = write(tmp_path / "file", content)
    with pytest.raises(ValueError, match=r"looks like .*, not a folder of Pascal VOC"):
        find_voc(path, tmp_path)
    if content is not COCO:
        with pytest.raises(ValueError, match=r"looks like .*, not a COCO file with the lists"):
            read_instances(path)
    if content not in ({"a": 1}, [{"score": 1}, 2]):  # which are records that lack something
        with pytest.raises(ValueError, match=r"looks like .*, not JSON lines for convert.jsonl"):
            find(path, tmp_path)


@pytest.mark.parametrize(("content", "what", "reader"), LOOKS, ids=[look[1][:20] for look in LOOKS])
def test_what_a_reader_refuses(tmp_path: Path, content: Any, what: str, reader: str) -> None:
    path = write(tmp_path / "file", content)
    if reader:
        refuse_other(path, "its own", reader)
    if reader in ("", "coco") and (reader or what.startswith(("JSON with", "plain", "an empty", "a binary"))):
        refuse_other(path, "COCO", "coco")
    else:
        with pytest.raises(ValueError, match=r"looks like .*, not COCO: "):
            refuse_other(path, "COCO", "coco")


def test_binary_files_are_not_bad_text(tmp_path: Path) -> None:
    path = write(tmp_path / "file", b"PAR1\xff\xfe")
    with pytest.raises(ValueError, match="looks like parquet, not a COCO file"):
        read_instances(path)
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_instances(write(path, '{"images": "é"}'.encode("latin-1")))


def test_a_json_file_of_many_lines_is_not_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(json.dumps({"a": 1, "b": [2]}, indent=1))
    with pytest.raises(ValueError, match="JSON with the keys a, b, not JSON lines"):
        find(path, tmp_path)


def test_a_broken_file_is_named_as_before(tmp_path: Path) -> None:
    path = write(tmp_path / "file", '{"images": [], "annotations": [')
    with pytest.raises(ValueError, match=r"is not JSON \(.*: give a COCO file"):
        read_instances(path)
    with pytest.raises(ValueError, match=r"lacks the lists \['categories'\]"):
        read_instances(write(path, {"images": [], "annotations": []}))
    assert find_coco(read_instances(write(path, COCO)), tmp_path).entries == []


@pytest.mark.parametrize("array", [False, True])
def test_lines_keep_their_order_numbers_and_ids(tmp_path: Path, array: bool) -> None:
    """Letters of several bytes, blanks between the records, a repeated id and one that is another's default."""
    (tmp_path / "é.jpg").write_bytes(picture())
    entries = [{"id": name} if name else {} for name in ("ü", None, "😀", "ü", "all-000002", 7)]
    records = [{"images": ["é.jpg"], "objects": [], "note": "日本😀", **entry} for entry in entries]
    texts = [json.dumps(record, ensure_ascii=False) for record in records]
    path = tmp_path / "all.json"
    text = "[\n " + " ,\n\t".join(texts) + "\n ]\n" if array else "\n".join(texts) + "\n"
    path.write_text("\ufeff" + text, encoding="utf-8")
    found: Any = find(path, tmp_path)
    ids = ["ü", "all-000002", "😀", "ü", "all-000002", "7"]
    assert [entry.id for entry in found.entries] == ids
    assert [entry.id for entry in found.entries[1:6:2]] == ids[1:6:2]
    assert found.entries[-1].id == "7"
    items = [item for item in read_items(found) if not hasattr(item, "what")]
    assert [getattr(item, "reason", "") for item in items] == ["", "", "", "duplicate id", "duplicate id", ""]
    place = "record" if array else "line"
    assert [entry.source for entry in found.entries][::5] == [f"all.json: {place} 1", f"all.json: {place} 6"]


def test_an_id_may_be_spelled_with_escapes(tmp_path: Path) -> None:
    """A line without an id is not parsed when the file is read for its ids: this one has one."""
    lines = ['{"images": ["a.jpg"]}', r'{"\u0069d": "x"}', '{"i\\u0064": "x"}', '{"text": "id"}']
    found: Any = find(write(tmp_path / "a.jsonl", "\n".join(lines)), tmp_path)
    assert [entry.id for entry in found.entries] == ["a-000001", "x", "x", "a-000004"]
    assert found.entries.repeated == {2}


def test_memory_does_not_follow_the_file(tmp_path: Path) -> None:
    """400 and 2,000 lines of 20 kB: what stays is a few bytes per line."""
    peaks = []
    for count in (400, 2000):
        path = tmp_path / "a.jsonl"
        line = json.dumps({"images": ["a.jpg"], "objects": [{"bbox_2d": [1, 2, 30, 40], "desc": "x" * 20_000}]})
        path.write_text(f"{line}\n" * count)
        tracemalloc.start()
        found = find(path, tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(found.entries) == count
    assert peaks[1] - peaks[0] < 1600 * 200


def test_an_array_that_is_not_one_is_read_as_lines(tmp_path: Path) -> None:
    for text in ('[{"a": 1}, ]', '[{"a": 1}] x', '[{"a": 1} {"b": 2}]', '[{"a": 1}'):
        items: list[Any] = read_items(find(write(tmp_path / "a.json", text), tmp_path))
        [item] = items
        assert item.reason in ("malformed json", "malformed record"), item
