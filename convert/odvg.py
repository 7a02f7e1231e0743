"""ODVG (Grounding DINO) → MDS.

    python -m convert.odvg --annotations train.jsonl --images DIR --out OUT --split train [--label-map map.json]

One image per line, boxes xyxy in pixels, of two kinds that a line may also hold together:

    {"filename": "a.jpg", "height": 480, "width": 640,
     "detection": {"instances": [{"bbox": [x1, y1, x2, y2], "label": 0, "category": "dog"}]},
     "grounding": {"caption": "a dog on grass", "regions": [{"bbox": [x1, y1, x2, y2], "phrase": "a dog"}]}}

An object's caption is its `category`, else the name of its `label` in the file `--label-map` ({"0": "dog"}, or a list
of names); if both are given they must agree. A region's caption is its `phrase`; its `bbox` may be a list of boxes. A
`caption` of the whole image is not read, but counted. Empty `instances` are an image known to hold nothing; empty
`regions` say only that nothing of the caption was found: not annotated. The default id is FILE-LINE.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from convert.formats import describe_other
from convert.items import BadRecord, Found, Note
from convert.lines import find_lines
from convert.records import Record, check_file, parse_box, parse_dict, parse_size, parse_text
from convert.remote import input_path
from convert.write import add_box_options, box_options, build_parser, run
from recipe.schema import Object


def read_label_map(path: Path) -> dict[str, str]:
    """Return the names of a label map by label, written as text.

    Raises:
        ValueError: It is not a JSON object from labels to names, or a list of names.
    """
    wanted = 'a label map such as {"0": "person", "1": "dog"}'
    check_file(path, wanted)
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(describe_other(path, wanted)) from error
    names = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(names, dict) or not all(isinstance(name, str) and name.strip() for name in names.values()):
        raise ValueError(f"{path} is not {wanted}: give each label its name as text")
    return {str(label): name.strip() for label, name in names.items()}


def find(annotations: Path, images: Path, label_map: Path | None = None, **options: Any) -> Found:
    """Return one record per line; see `find_lines`, also for `options`.

    Raises:
        ValueError: As `find_lines`, or `label_map` is not such a file.
    """
    names = {} if label_map is None else read_label_map(label_map)
    return find_lines(annotations, images, partial(_parse, names), ("odvg",), **options)


def _parse(names: Mapping[str, str], entry: dict[str, Any]) -> Record:
    kinds = [kind for kind in ("detection", "grounding") if entry.get(kind) is not None]
    if not kinds:
        raise BadRecord("malformed record", f"neither detection nor grounding, but the keys {sorted(entry)}")
    objects: list[Object] = []
    if "detection" in kinds:
        for number, item in enumerate(_parse_list(entry, "detection", "instances"), start=1):
            objects.append(Object(parse_box(item.get("bbox")), _parse_name(item, names, number)))
    is_known, notes = "detection" in kinds, []
    if "grounding" in kinds:
        for item in _parse_list(entry, "grounding", "regions"):
            boxes = item.get("bbox")
            nested = isinstance(boxes, list) and bool(boxes) and isinstance(boxes[0], list)
            phrase = _parse_phrase(item.get("phrase"))
            objects += [Object(parse_box(box), phrase) for box in (boxes if nested and boxes else [boxes])]
        if entry["grounding"].get("caption"):
            notes.append(Note("captions of whole images, which are not read", 1))
    unique = list(dict.fromkeys(objects))
    if len(unique) < len(objects):
        notes.append(Note("objects listed twice, taken once", len(objects) - len(unique)))
    return Record(
        parse_text(entry.get("filename"), "filename"),
        unique if unique or is_known else None,
        parse_size(entry.get("width"), entry.get("height")),
        notes=tuple(notes),
    )


def _parse_list(entry: dict[str, Any], kind: str, name: str) -> list[dict[str, Any]]:
    items = parse_dict(entry[kind], kind).get(name)
    if not isinstance(items, list):
        raise BadRecord("malformed record", f"{kind} lacks the list {name}: it has the keys {sorted(entry[kind])}")
    what = f"an entry of {name}"
    return [parse_dict(item, what) for item in items]


def _parse_name(item: dict[str, Any], names: Mapping[str, str], number: int) -> str:
    """Return the name of the instance `number` by its category, or by its label in the label map `names`."""
    label, category = item.get("label"), item.get("category")
    mapped = names.get(str(label)) if names else None
    if mapped is None and isinstance(category, str):
        return category.strip()
    where = f"instance {number}"
    if category is None:
        if mapped is None:
            remedy = "its label map has no such label" if names else "give --label-map"
            raise BadRecord("unknown category", f"{where} has the label {label!r} and no category: {remedy}")
        return mapped
    category = parse_text(category, f"the category of {where}")
    if mapped not in (None, category):
        raise BadRecord("unknown category", f"{where} is a {category!r}, but its label {label!r} is {mapped!r}")
    return category


def _parse_phrase(value: Any) -> str:
    """Return a phrase, which some writers give in pieces."""
    pieces = value if isinstance(value, list) else [value]
    return " ".join(parse_text(piece, "phrase") for piece in pieces)


def main() -> None:
    """Run the command line."""
    parser = build_parser("odvg", __doc__)
    parser.add_argument("--annotations", type=input_path, required=True, metavar="FILE", help="the file of JSON lines")
    parser.add_argument(
        "--images",
        type=input_path,
        required=True,
        metavar="DIR",
        help="folder of the images: filename is relative to it",
    )
    parser.add_argument(
        "--label-map", type=input_path, metavar="FILE", help="names of the labels that have no category"
    )
    add_box_options(parser)
    run(parser, lambda args: find(args.annotations, args.images, args.label_map, **box_options(args)))


if __name__ == "__main__":
    main()
