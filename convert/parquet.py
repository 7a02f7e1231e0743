"""Hugging Face object detection in parquet → MDS.

    python -m convert.parquet --annotations FOLDER --out OUT --split train

A column `image` of {bytes, path}, and a column `objects` of {bbox, category}, as lists side by side or as a list of
structs; `area` and `iscrowd` are kept if they are there. Class names are those of the features in the schema. Boxes are
x, y, width, height (`--bbox-format` for others). Of a folder the files of `--split` are read, by name
(train-00000-of-00002.parquet), or all if their names state no split. Needs pyarrow: pip install '.[parquet]'.
"""

import json
import re
from collections.abc import Iterator
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

from convert.coco import parse_flag, to_key
from convert.formats import refuse_other
from convert.items import BadRecord, Found
from convert.records import Parse, Record, list_records, parse_box, parse_dict, parse_optional, parse_size
from convert.write import add_box_options, box_options, build_parser, run
from recipe.schema import Object

BBOX_FORMATS = ("xywh", "xyxy", "cxcywh")
_BOXES, _CATEGORIES = ("bbox", "bboxes", "boxes"), ("category", "categories", "label", "labels", "category_id")
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")


def list_files(annotations: Path, split: str) -> list[Path]:
    """Return a file, or the parquet files of a folder that are of the split, by name; raise ValueError if none is."""
    if not annotations.is_dir():
        return [annotations]
    files = sorted(annotations.rglob("*.parquet"))
    splits = {file: match[1] for file in files if (match := _SHARD.match(file.name))}
    found = [file for file in files if splits.get(file, split) == split]
    if not found:
        others = f", only of {', '.join(sorted(set(splits.values())))}" if splits else ""
        raise ValueError(f"{annotations} has no parquet file of --split {split}{others}")
    return found


def find(annotations: Path, images: Path | None, split: str, bbox_format: str = "xywh", **boxes: Any) -> Found:
    """Return one record per row, file by file. Paths without bytes are under `images`, or in the annotations' folder.

    Only ids are read here; a row group is read when its first record is parsed. For `boxes` see `list_records`.

    Raises:
        ValueError: pyarrow is not installed, a file is not parquet or lacks a column, or `images` is not a folder.
    """
    root = images or (annotations if annotations.is_dir() else annotations.parent)
    files = list_files(annotations, split)
    rows = (row for file in files for row in _rows(file, bbox_format))
    records = list_records(root, rows, **boxes)  # which names a file that cannot be read
    names = dict.fromkeys(name.strip() for file in files for name in _names_of(_open(file)) or ())
    return Found(records, classes=list(names))


def _rows(path: Path, bbox_format: str) -> Iterator[tuple[str, str, Parse]]:
    file, row = _open(path), 0
    columns = file.schema_arrow.names
    if missing := {"image", "objects"}.difference(columns):
        raise ValueError(f"{path} lacks the columns {sorted(missing)}, it has {columns}: rename those that hold them")
    names = _names_of(file)
    id_column = next((name for name in ("image_id", "id") if name in columns), None)
    for group in range(file.num_row_groups):
        ids = [None] * file.metadata.row_group(group).num_rows
        if id_column is not None:
            ids = file.read_row_group(group, [id_column], use_threads=False).column(0).to_pylist()
        for position, value in enumerate(ids):
            row += 1
            parse = partial(_parse, path, group, position, names, bbox_format)
            yield to_key(value) or f"{path.stem}-{row:06d}", f"{path.name}: row {row}", parse


@cache
def _open(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError("parquet files need pyarrow: pip install '.[parquet]'") from error
    if path.is_file():
        refuse_other(path, "a parquet file", "parquet")
    try:
        return ParquetFile(path, memory_map=True)
    except (OSError, ArrowException) as error:
        raise ValueError(f"{path} is not a parquet file ({error})") from error


@lru_cache(maxsize=1)
def _read_group(path: Path, group: int) -> Any:
    """Return one row group. Records are read in order, so one is kept; and without threads, as workers are forked."""
    return _open(path).read_row_group(group, use_threads=False)


def _names_of(file: Any) -> list[str] | None:
    """Return the class names in the features of a file's schema."""
    metadata = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    return _class_names(metadata.get("info", {}).get("features", {}).get("objects"))


def _class_names(feature: Any) -> list[str] | None:
    """Return the names of the ClassLabel of a category, whatever lists are around it and the objects."""
    while isinstance(feature, list) or (isinstance(feature, dict) and "feature" in feature):
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel":
        return feature["names"]
    return next((_class_names(feature[name]) for name in _CATEGORIES if name in feature), None)


def _parse(path: Path, group: int, position: int, names: list[str] | None, bbox_format: str) -> Record:
    row: dict[str, Any] = _read_group(path, group).slice(position, 1).to_pylist()[0]
    value, items = row["image"], row["objects"]
    image: Any = value if isinstance(value, dict) else {"bytes" if isinstance(value, bytes) else "path": value}
    if isinstance(items, dict):  # lists side by side
        lists = {name: values for name, values in items.items() if isinstance(values, list)}
        if len({len(values) for values in lists.values()}) > 1:
            raise BadRecord("unequal lengths", ", ".join(f"{len(values)} {name}" for name, values in lists.items()))
        items = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    parse = partial(_parse_object, names=names, bbox_format=bbox_format)
    objects = None if items is None else [parse(parse_dict(item, "an object")) for item in items]
    size = parse_size(row.get("width"), row.get("height"))
    return Record(image.get("path") or path.name, objects, size, content=image.get("bytes"))


def _parse_object(item: dict[str, Any], names: list[str] | None, bbox_format: str) -> Object:
    box, category = (next((item[key] for key in keys if key in item), None) for keys in (_BOXES, _CATEGORIES))
    a, b, c, d = parse_box(box)
    if bbox_format == "cxcywh":
        a, b = a - c / 2, b - d / 2
    if not isinstance(category, str):
        if not isinstance(category, int) or names is None or not 0 <= category < len(names):
            text = f"{category!r}, and the features name {len(names or ())} classes: store names, or a ClassLabel"
            raise BadRecord("unknown category", text)
        category = names[category]
    area = parse_optional(item.get("area"))
    return Object(
        (a, b, c, d) if bbox_format == "xyxy" else (a, b, a + c, b + d),
        category.strip(),
        parse_flag(item, "iscrowd"),
        area if area is not None and area >= 0 else None,
    )


def main() -> None:
    """Run the command line."""
    parser = build_parser("parquet", __doc__)
    parser.add_argument("--annotations", type=Path, required=True, metavar="PATH", help="a parquet file, or a folder")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where paths without bytes are looked up")
    parser.add_argument("--bbox-format", choices=BBOX_FORMATS, default="xywh", help="default: %(default)s")
    add_box_options(parser)
    run(parser, lambda args: find(args.annotations, args.images, args.split, args.bbox_format, **box_options(args)))


if __name__ == "__main__":
    main()
