"""COCO instances → MDS.

    python -m convert.coco --annotations instances.json --images DIR --out OUT --split train [--captions regions.json]

A box's caption is its category's name, or its phrase in the `--captions` file:
`{"regions": [{"annotation_id": 1, "phrase": "a white stove"}, ...]}`. If an annotation has several phrases, the
first is taken. An image without annotations is known to hold nothing. Crowd regions (`iscrowd` or `ignore`) are kept
and marked, `area` is kept. Ids are compared by value: 1, "1" and 1.0 are the same.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from posixpath import normpath
from typing import Any

from convert.formats import describe_other, look_at, starts_as_json
from convert.items import BadRecord, Found, Note, Rejected
from convert.records import (
    Record,
    check_file,
    list_records,
    parse_box,
    parse_dict,
    parse_number,
    parse_optional,
    parse_size,
    parse_text,
)
from convert.remote import input_path
from convert.write import add_box_options, box_options, build_parser, run
from recipe.schema import Box, Object, Searched


def read_instances(path: Path, keys: Sequence[str] = ("images", "annotations", "categories")) -> dict[str, list[Any]]:
    """Return the lists `keys` of a COCO file.

    Raises:
        ValueError: It is not such a file.
    """
    wanted = f"a COCO file with the lists {', '.join(keys)}"
    check_file(path, wanted)
    try:
        text = path.read_bytes()
        text = text.decode(json.detect_encoding(text), "surrogatepass")  # frees the bytes
        data = json.loads(text, object_hook=_without_mask)
    except UnicodeDecodeError as error:
        if not starts_as_json(path):
            raise ValueError(describe_other(path, wanted)) from error
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
    except ValueError as error:
        if starts_as_json(path) and look_at(path)[1] in ("coco", ""):
            raise ValueError(f"{path} is not JSON ({error}): give {wanted}") from error
        raise ValueError(describe_other(path, wanted)) from error
    missing = [key for key in keys if not (isinstance(data, dict) and isinstance(data.get(key), list))]
    if missing and (len(missing) == len(keys) or look_at(path)[1] not in ("coco", "")):
        raise ValueError(describe_other(path, wanted))
    if missing:
        raise ValueError(f"{path} lacks the lists {missing}: give {wanted}")
    return {key: data[key] for key in keys}


def _without_mask(item: dict[str, Any]) -> dict[str, Any]:
    """Leave the polygons out if there is a box: they take ten times its memory."""
    if item.get("bbox"):
        item.pop("segmentation", None)
    return item


def find(
    instances: Mapping[str, Sequence[Any]],
    images: Path,
    captions: Path | None = None,
    source: str = "instances",
    **boxes: Any,
) -> Found:
    """Return one record per image file, in the file's order.

    Annotations of no image and phrases of no annotation come first, as rejected records, which name the file `source`.
    `file_name` is relative to the folder `images`. For `boxes` see `list_records`.

    Raises:
        ValueError: `images` is not a folder, a category has no name or shares its id, no image has a file name, most
            annotations belong to no image, or `captions` is not a file of phrases.
    """
    names, leading = _category_names(instances["categories"]), []
    entries = instances["images"]
    if entries and not any(isinstance(image, dict) and image.get("file_name") for image in entries):
        raise ValueError(
            f"{source}: no image has a file_name: add the path of its file to each, or use python -m convert.lvis if "
            "it is a file of LVIS"
        )
    known = dict.fromkeys(key for image in entries if (key := _key(image, "id")) is not None)
    annotations: dict[str, list[dict[str, Any]]] = defaultdict(list)
    distinct, num_repeated = _without_repeats(instances["annotations"])
    if num_repeated:
        leading.append(Note("annotations listed twice: the first is kept", num_repeated))
    for position, annotation in distinct:
        image_id = _key(annotation, "image_id")
        if image_id is None or image_id not in known:
            label, where = _key(annotation, "id") or "", f"{source}: annotation {position}"
            leading.append(Rejected(label, where, "unknown image", f"image_id {_raw(annotation, 'image_id')!r}"))
        else:
            annotations[image_id].append(annotation)
    orphans = [item for item in leading if isinstance(item, Rejected)]
    if 2 * len(orphans) > len(distinct):
        raise ValueError(
            f"{source}: {len(orphans)} of {len(distinct)} annotations belong to no image (the first has "
            f"{orphans[0].detail}, the first image the id {next(iter(known), None)!r}): correct the ids, or leave out "
            "the annotations of images that are not listed"
        )
    phrases: dict[str, str] = {}
    if captions is not None:
        counts = Counter(_key(annotation, "id") for _, annotation in distinct)
        leading += _read_phrases(captions, counts, phrases)
    rows = []
    for positions, ids, error in _group(entries):
        found = [annotation for image_id in ids for annotation in annotations.get(image_id, [])]
        parse = partial(
            _parse, [entries[position] for position in positions], error, found, names, phrases, bool(orphans)
        )
        rows.append((ids[0] if ids else "", f"{source}: image {positions[0]}", parse))
    # Phrases are open captions.
    return Found(list_records(images, rows, **boxes), leading, [] if phrases else list(names.values()))


def _group(entries: Sequence[Any]) -> Iterator[tuple[list[int], list[str], BadRecord | None]]:
    """Yield (positions, ids, error) of the entries of each image file.

    Entries of one file are one image. If an id names several files, it is unknown whose its annotations are: all
    entries of these files are refused.
    """
    files: dict[str, list[int]] = defaultdict(list)
    by_id: dict[str, dict[str, None]] = defaultdict(dict)
    alone = []
    for position, image in enumerate(entries):
        key, name = _key(image, "id"), _raw(image, "file_name")
        if key is None or not isinstance(name, str):
            alone.append(position)
            continue
        file = normpath(name.strip().replace("\\", "/"))
        by_id[key][file] = None
        files[file].append(position)
    refused = {}
    for key, shared in by_id.items():
        if len(shared) > 1:
            text = f"id {key} is that of {' and '.join(list(shared)[:3])}: it is unknown whose its annotations are"
            refused |= dict.fromkeys(shared, BadRecord("duplicate id", text))
    groups = [([position], None) for position in alone]
    for file, positions in files.items():
        error = refused.get(file)
        groups += [(positions, None)] if error is None else [([position], error) for position in positions]
    for positions, error in sorted(groups, key=lambda group: group[0]):
        keys = (_key(entries[position], "id") for position in positions)
        yield positions, list(dict.fromkeys(key for key in keys if key is not None)), error


def _without_repeats(annotations: Sequence[Any]) -> tuple[list[tuple[int, Any]], int]:
    """Return the annotations with their positions, and how many were left out: equal ones with one id."""
    counts = Counter(_key(annotation, "id") for annotation in annotations)
    kept, seen = [], set()
    for position, annotation in enumerate(annotations):
        key = _key(annotation, "id")
        if key is not None and counts[key] > 1:
            text = json.dumps(annotation, sort_keys=True)
            if text in seen:
                continue
            seen.add(text)
        kept.append((position, annotation))
    return kept, len(annotations) - len(kept)


def _parse(
    entries: list[Any],
    error: BadRecord | None,
    annotations: list[dict[str, Any]],
    names: dict[str, str],
    phrases: dict[str, str],
    has_orphans: bool,
) -> Record:
    if error is not None:
        raise error
    image = parse_dict(entries[0], "image")
    if _key(image, "id") is None:
        raise BadRecord("malformed record", f"image has the id {image.get('id')!r}")
    name = parse_text(image.get("file_name"), "file_name")
    sizes = [parse_size(entry.get("width"), entry.get("height")) for entry in entries]
    stated = list(dict.fromkeys(size for size in sizes if size is not None))
    if len(stated) > 1:
        raise BadRecord("wrong size", f"the entries of {name} state {' and '.join(f'{w:g}x{h:g}' for w, h in stated)}")
    objects, labels, num_areas = [], [], 0
    for annotation in annotations:
        label = f"annotation {_key(annotation, 'id') or 'without id'}"
        try:
            item = _parse_annotation(annotation, names, phrases)
        except BadRecord as failure:
            raise BadRecord(failure.reason, f"{label}: {failure.detail}") from failure
        if len(entries) > 1 and item in objects:
            continue  # entries of one file often repeat each other
        objects.append(item)
        labels.append(label)
        num_areas += item.area is None and annotation.get("area") not in (None, "")
    notes = [Note("areas that are not numbers left out", num_areas)] if num_areas else []
    if len(entries) > 1:
        notes.append(Note("image files of several entries: merged", 1, (name,)))
    size, is_known = stated[0] if stated else None, bool(objects) or not has_orphans
    if not is_known:  # the annotations of no image may be its own
        notes.append(Note("images not known to be empty, since annotations belong to no image", 1, (name,)))
    searched = _parse_searched(entries, names)
    return Record(name, objects if is_known else None, size, labels=labels, notes=tuple(notes), searched=searched)


def _parse_searched(entries: list[dict[str, Any]], names: dict[str, str]) -> Searched | None:
    """Return LVIS's lists of categories of an image, by name; None if it has none."""
    lists: list[dict[str, None]] = []
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        ids: list[Any] = []
        for value in (entry.get(key) or [] for entry in entries):
            if not isinstance(value, list | tuple):
                raise BadRecord("malformed record", f"{key} is {value!r}, not a list")
            ids += value
        if unknown := [value for value in ids if to_key(value) not in names]:
            raise BadRecord("unknown category", f"{key} holds {unknown[0]!r}")
        lists.append({names[to_key(value) or ""]: None for value in ids})
    has_lists = any("neg_category_ids" in entry or "not_exhaustive_category_ids" in entry for entry in entries)
    return Searched(*map(tuple, lists)) if has_lists else None


def _parse_annotation(annotation: dict[str, Any], names: dict[str, str], phrases: dict[str, str]) -> Object:
    category = _key(annotation, "category_id")
    if category not in names:
        raise BadRecord("unknown category", f"category_id {annotation.get('category_id')!r}")
    area = parse_optional(annotation.get("area"))
    return Object(
        box=parse_bbox(annotation),
        caption=phrases.get(_key(annotation, "id") or "", names[category]),
        iscrowd=parse_flag(annotation, "iscrowd") | parse_flag(annotation, "ignore"),
        area=area if area is not None and area >= 0 else None,
    )


def parse_bbox(annotation: dict[str, Any]) -> Box:
    """Return the box as xyxy; that of the polygons if there is no `bbox`."""
    if annotation.get("bbox") not in (None, []):
        x, y, width, height = parse_box(annotation["bbox"])
        return x, y, x + width, y + height
    polygons = annotation.get("segmentation")
    if not isinstance(polygons, list) or not polygons:
        what = "a mask as run lengths, which is not read" if polygons else "no mask"
        raise BadRecord("malformed box", f"no bbox, and {what}: add the bbox")
    points = [polygon if isinstance(polygon, list) else [None] for polygon in polygons]
    numbers = [[parse_number(value, "malformed box") for value in polygon] for polygon in points]
    if any(len(polygon) < 6 or len(polygon) % 2 for polygon in numbers):
        raise BadRecord("malformed box", "no bbox, and a polygon that is not at least three points: add the bbox")
    xs = [x for polygon in numbers for x in polygon[::2]]
    ys = [y for polygon in numbers for y in polygon[1::2]]
    return min(xs), min(ys), max(xs), max(ys)


def parse_flag(annotation: dict[str, Any], name: str) -> bool:
    """Return a flag of an annotation, False if it has none, or raise `BadRecord`."""
    value = annotation.get(name)
    if value is None:
        return False
    text = str(value).strip().lower()
    if text in ("1", "1.0", "true"):
        return True
    if text in ("", "0", "0.0", "false"):
        return False
    raise BadRecord("malformed flag", f"{name} is {value!r}, not 0 or 1")


def _category_names(categories: Sequence[Any]) -> dict[str, str]:
    names: dict[str, str] = {}
    for category in categories:
        key, name = _key(category, "id"), _raw(category, "name")
        if key is None or not isinstance(name, str):
            raise ValueError(f"category {category!r} lacks an id or a name")
        if names.setdefault(key, name.strip()) != name.strip():
            raise ValueError(
                f"the categories {names[key]!r} and {name.strip()!r} share the id {key}: give each its own"
            )
    return names


def _read_phrases(path: Path, counts: Mapping[str | None, int], phrases: dict[str, str]) -> Iterator[Rejected | Note]:
    """Fill `phrases` (annotation id → phrase) and yield those that were not used; `counts` are annotations per id."""
    for position, entry in enumerate(read_instances(path, ("regions",))["regions"]):
        key = _key(entry, "annotation_id")
        where = f"{path.name}: region {position}"
        if key is None or not counts.get(key):
            raw = _raw(entry, "annotation_id")
            yield Rejected(key or "", where, "phrase of an unknown annotation", f"annotation_id {raw!r}")
        elif counts[key] > 1:
            text = f"{counts[key]} annotations have the id {key}: give each its own"
            yield Rejected(key, where, "phrase of several annotations", text)
        elif key in phrases:
            yield Note("further phrases of an annotation left out: the first is its caption", 1)
        elif not isinstance(entry.get("phrase"), str):
            yield Rejected(key, where, "malformed phrase", repr(entry.get("phrase")))
        else:
            phrases[key] = entry["phrase"].strip()


def _raw(entry: Any, name: str) -> Any:
    return entry.get(name) if isinstance(entry, dict) else None


def _key(entry: Any, name: str) -> str | None:
    """Return an id of `entry` as text, None if it has none; 1, "1" and 1.0 are the same id."""
    return to_key(_raw(entry, name))


def to_key(value: Any) -> str | None:
    """Return an id as text, see `_key`."""
    if type(value) is int:
        return str(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = int(value) if value.is_integer() else value
    text = str(value).strip()
    whole, point, rest = text.partition(".")
    return whole if point and whole.lstrip("-").isdecimal() and rest and not rest.strip("0") else text or None


def main() -> None:
    """Run the command line."""
    parser = build_parser("coco", __doc__)
    parser.add_argument("--annotations", type=input_path, required=True, metavar="FILE", help="the instances file")
    parser.add_argument(
        "--images",
        type=input_path,
        required=True,
        metavar="DIR",
        help="folder of the images: file_name is relative to it",
    )
    parser.add_argument(
        "--captions", type=input_path, metavar="FILE", help="phrases by annotation_id, in place of the category's name"
    )
    add_box_options(parser)
    run(
        parser,
        lambda args: find(
            read_instances(args.annotations), args.images, args.captions, args.annotations.name, **box_options(args)
        ),
    )


if __name__ == "__main__":
    main()
