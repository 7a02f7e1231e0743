"""YOLO labels (Ultralytics or darknet) → MDS.

    python -m convert.yolo --annotations data.yaml --out OUT --split train [--images DIR]

`data.yaml` holds `names`, and per part (`train`, `val`, `test`) a folder, a list of folders or a file of paths.
`--split` picks the part. In its place: `obj.data`, or a folder with one of them, classes.txt or obj.names. A label
file has its image's name and .txt, under `labels` in place of the last `images` of its path, or else next to it. A line
is `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`, in parts of the image; polygons and rotated boxes (four points)
give the box around them. The caption is the class's name. An image without a label file is known to hold nothing, as in
Ultralytics, and counted. The id is the image's path.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from convert.items import BadRecord, Found, Note
from convert.records import Record, list_records
from convert.write import add_box_options, box_options, build_parser, run
from convert.yolo_layout import find_label, label_paths, read_layout
from recipe.schema import Object

_ENDS = {"norm1": 1.5, "norm1000": 1500.0}  # beyond these, numbers are in another unit


def find(
    annotations: Path, split: str, images: Path | None = None, bbox_type: str | None = None, **options: Any
) -> Found:
    """Return one record per image of a part, by path.

    For `images` see `read_layout`, for `options` `list_records`. Boxes are `norm1` unless `bbox_type` says otherwise.

    Raises:
        ValueError: As `read_layout` and `list_images`, or no image of the part has a label file.
    """
    layout = read_layout(annotations, images)
    files = layout.list_images(split)
    if not files:
        raise ValueError(f"{layout.source}: the part {split} has no images")
    labels = [find_label(path) for path in files]
    if not any(labels):
        places = " or ".join(dict.fromkeys(label_paths(files[0])))
        raise ValueError(f"no image of {split} has a label file: {places} is not there")
    # Paths and ids are relative to the folder of the description, if all files are below it.
    there = [path for path in files if os.path.isfile(path)] or files
    root = os.path.commonpath([os.path.dirname(path) for path in there])
    root = next((str(base) for base in layout.bases if Path(root).is_relative_to(base)), root)
    bbox_type = bbox_type or "norm1"
    parse = partial(_parse, layout.names, layout.num_values, _ENDS.get(bbox_type))
    rows = []
    start = os.path.join(root, "")
    for path, label in zip(files, labels, strict=True):
        name, source = path.removeprefix(start), (label or path).removeprefix(start)
        source = os.path.relpath(source, root) if os.path.isabs(source) else source
        rows.append((name, source if label else name, partial(parse, name, label)))
    classes = [layout.names[index] for index in sorted(layout.names)]
    return Found(list_records(Path(root), rows, bbox_type, **options), classes=classes)


def _parse(
    names: Mapping[int, str], num_values: int | None, end: float | None, image: str, label: str | None
) -> Record:
    if label is None:
        return Record(image, [], notes=(Note("images without a label file: known to hold nothing", 1, (image,)),))
    try:
        with open(label, "rb") as file:
            rows = [line.split() for line in file.read().decode("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise BadRecord("malformed record", f"the label file cannot be read: {error}") from error
    notes: list[Note] = []
    objects = _parse_boxes([row for row in rows if row], names, num_values, end)
    if objects is None:
        objects = []
        for number, row in enumerate(rows, start=1):
            try:
                objects += [_parse_line(row, names, num_values, end, notes)] if row else []
            except BadRecord as error:
                raise BadRecord(error.reason, f"line {number}: {error.detail}") from error
    unique = list(dict.fromkeys(objects))
    if len(unique) < len(objects):
        notes.append(Note("labels listed twice, taken once", len(objects) - len(unique)))
    return Record(image, unique, notes=tuple(notes))


def _parse_boxes(
    rows: Sequence[list[str]], names: Mapping[int, str], num_values: int | None, end: float | None
) -> list[Object] | None:
    """Return the objects of a file of good boxes alone, at once; None if `_parse_line` must look at its lines."""
    try:
        numbers, xs, ys, widths, heights = (list(map(float, column)) for column in zip(*rows, strict=True))
        captions = [names[number] for number in numbers]  # pyright: ignore[reportArgumentType] - 1.0 is the key 1
    except (ValueError, KeyError):
        return None
    columns = (xs, ys, widths, heights)
    if num_values == 5 or (end is not None and not -end <= min(map(min, columns)) <= max(map(max, columns)) <= end):
        return None
    return [
        Object((x - width / 2, y - height / 2, x + width / 2, y + height / 2), caption)
        for x, y, width, height, caption in zip(*columns, captions, strict=True)
    ]


def _parse_line(
    words: list[str], names: Mapping[int, str], num_values: int | None, end: float | None, notes: list[Note]
) -> Object:
    """Return the object of a label line; add to `notes` what was done to it."""
    try:
        values = [float(word) for word in words]
    except ValueError as error:
        raise BadRecord("malformed record", f"{' '.join(words)[:60]!r} is not a class and numbers") from error
    category, numbers = values[0], values[1:]
    if not category.is_integer() or int(category) not in names:
        raise BadRecord("unknown category", f"class {words[0]}: names has the classes {min(names)} to {max(names)}")
    if num_values is not None and len(values) == num_values:
        numbers = numbers[:4]
        notes.append(Note("keypoints, which are not read", 1))
    elif len(numbers) == 5:  # of predictions
        numbers = numbers[:4]
        notes.append(Note("confidences, which are not read", 1))
    if end is not None and any(abs(number) > end for number in numbers):
        raise BadRecord(
            "malformed box", f"{max(numbers, key=abs):g} is not a part of the image: give --bbox-type real?"
        )
    if len(numbers) == 4:
        x, y, width, height = numbers
        return Object((x - width / 2, y - height / 2, x + width / 2, y + height / 2), names[int(category)])
    if len(numbers) < 6 or len(numbers) % 2:
        raise BadRecord("malformed box", f"{len(numbers)} numbers after the class: a box has 4, a polygon 2 per point")
    notes.append(Note("polygons read as the box around them", 1))
    xs, ys = numbers[::2], numbers[1::2]
    return Object((min(xs), min(ys), max(xs), max(ys)), names[int(category)])


def main() -> None:
    """Run the command line."""
    parser = build_parser("yolo", __doc__)
    parser.add_argument(
        "--annotations", type=Path, required=True, metavar="FILE", help="data.yaml, obj.data, or their folder"
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder that the paths of data.yaml are relative to; default: its path",
    )
    add_box_options(parser, "norm1")
    run(parser, lambda args: find(args.annotations, args.split, args.images, **box_options(args)))


if __name__ == "__main__":
    main()
