"""COCO instances → MDS.

    python -m convert.coco --annotations instances.json --images DIR --out OUT --split train [--captions regions.json]

A box's caption is its category's name, or its phrase in the `--captions` file:
`{"regions": [{"annotation_id": 1, "phrase": "a white stove"}, ...]}`. If an annotation has several phrases, the
first is taken. An image without annotations is known to hold nothing. Crowd regions (`iscrowd`) are kept and marked,
`area` is kept.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from convert.items import Found, Note, Rejected
from convert.records import (
    BadRecord,
    Record,
    check_file,
    list_records,
    parse_box,
    parse_dict,
    parse_number,
    parse_text,
)
from convert.write import build_parser, run
from recipe.schema import Object


def read_instances(path: Path, keys: Sequence[str] = ("images", "annotations", "categories")) -> dict[str, list[Any]]:
    """Return the lists `keys` of a COCO file.

    Raises:
        ValueError: It is not such a file.
    """
    wanted = f"a COCO file with the lists {', '.join(keys)}"
    check_file(path, wanted)
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): give {wanted}") from error
    missing = [key for key in keys if not (isinstance(data, dict) and isinstance(data.get(key), list))]
    if missing:
        raise ValueError(f"{path} lacks the lists {missing}: give {wanted}")
    return {key: data[key] for key in keys}


def find(
    instances: Mapping[str, Sequence[Any]], images: Path, captions: Path | None = None, source: str = "instances"
) -> Found:
    """Return one record per image, in the file's order.

    Annotations of no image and phrases of no annotation come first, as rejected records, which name the file `source`.
    `file_name` is relative to the folder `images`.

    Raises:
        ValueError: `images` is not a folder, a category has no name, or `captions` is not a file of phrases.
    """
    names, leading = _category_names(instances["categories"]), []
    image_ids = {_key(image, "id") for image in instances["images"]}
    annotations: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for position, annotation in enumerate(instances["annotations"]):
        image_id = _key(annotation, "image_id")
        if image_id is None or image_id not in image_ids:
            label = str(_key(annotation, "id") or "")
            leading.append(
                Rejected(label, f"{source}: annotation {position}", "unknown image", f"image_id {image_id!r}")
            )
        else:
            annotations[image_id].append(annotation)
    phrases: dict[Any, str] = {}
    if captions is not None:
        known = {_key(annotation, "id") for annotation in instances["annotations"]} - {None}
        leading += _read_phrases(captions, known, phrases)
    rows = []
    for position, image in enumerate(instances["images"]):
        image_id = _key(image, "id")
        parse = partial(_parse, image, annotations.get(image_id, []), names, phrases)
        rows.append(("" if image_id is None else str(image_id), f"{source}: image {position}", parse))
    return Found(list_records(images, rows), leading)


def _parse(image: Any, annotations: list[dict[str, Any]], names: dict[Any, str], phrases: dict[Any, str]) -> Record:
    image = parse_dict(image, "image")
    if _key(image, "id") is None:
        raise BadRecord("malformed record", f"image has the id {image.get('id')!r}")
    size = None
    if "width" in image or "height" in image:
        size = (parse_number(image.get("width")), parse_number(image.get("height")))
    objects = [_parse_annotation(annotation, names, phrases) for annotation in annotations]
    return Record(parse_text(image.get("file_name"), "file_name"), objects, size)


def _parse_annotation(annotation: dict[str, Any], names: dict[Any, str], phrases: dict[Any, str]) -> Object:
    category = _key(annotation, "category_id")
    if category not in names:
        raise BadRecord("unknown category", f"category_id {annotation.get('category_id')!r}")
    x, y, width, height = parse_box(annotation.get("bbox"))
    area = annotation.get("area")
    return Object(
        box=(x, y, x + width, y + height),
        caption=phrases.get(_key(annotation, "id"), names[category]),
        iscrowd=bool(annotation.get("iscrowd", 0)),
        area=None if area is None else parse_number(area, "malformed area"),
    )


def _category_names(categories: Sequence[Any]) -> dict[Any, str]:
    names = {}
    for category in categories:
        key = _key(category, "id")
        if key is None or not isinstance(category.get("name"), str):
            raise ValueError(f"category {category!r} lacks an id or a name")
        names[key] = category["name"].strip()
    return names


def _read_phrases(path: Path, known: set[Any], phrases: dict[Any, str]) -> Iterator[Rejected | Note]:
    """Fill `phrases` (annotation id → phrase) and yield those that were not used."""
    for position, entry in enumerate(read_instances(path, ("regions",))["regions"]):
        key = _key(entry, "annotation_id")
        where = f"{path.name}: region {position}"
        if key not in known:
            yield Rejected(str(key or ""), where, "phrase of an unknown annotation", f"annotation_id {key!r}")
        elif key in phrases:
            yield Note("further phrases of an annotation left out: the first is its caption", 1)
        elif not isinstance(entry.get("phrase"), str):
            yield Rejected(str(key), where, "malformed phrase", repr(entry.get("phrase")))
        else:
            phrases[key] = entry["phrase"].strip()


def _key(entry: Any, name: str) -> int | str | None:
    """Return an id of `entry`, None if it has none."""
    value = entry.get(name) if isinstance(entry, dict) else None
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def main() -> None:
    """Run the command line."""
    parser = build_parser("coco", __doc__)
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="the instances file")
    parser.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="folder of the images: file_name is relative to it"
    )
    parser.add_argument(
        "--captions", type=Path, metavar="FILE", help="phrases by annotation_id, in place of the category's name"
    )
    run(parser, lambda args: find(read_instances(args.annotations), args.images, args.captions, args.annotations.name))


if __name__ == "__main__":
    main()
