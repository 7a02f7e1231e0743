"""Visual Genome → MDS.

    python -m convert.visual_genome --annotations region_descriptions.json --images DIR --out OUT --split train
    python -m convert.visual_genome --annotations objects.json --attributes attributes.json --images DIR ...

Of `region_descriptions.json` a box's caption is its phrase. Of `objects.json` it is the object's first name, after its
attributes if `--attributes` is given: "white wooden table". `image_data.json` (`--image-data`, by default the one next
to the annotations) names each image's file by its address, VG_100K/5.jpg or VG_100K_2/1.jpg under `--images`, or the
last part alone, and states its size. An image without regions or objects is not annotated.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from convert.coco import to_key
from convert.formats import refuse_other
from convert.image_files import name_of_url
from convert.items import BadRecord, Found
from convert.records import (
    Parse,
    Record,
    check_file,
    list_records,
    parse_dict,
    parse_number,
    parse_size,
    parse_text,
)
from convert.remote import input_path
from convert.write import add_box_options, box_options, build_parser, run
from recipe.schema import Box, Object

_LISTS = ("regions", "objects", "attributes")  # of an entry's boxes, by file
_WANTED = "Visual Genome's region_descriptions.json or objects.json"
_BEGIN, _COMMA, _END = (re.compile(pattern) for pattern in (r"\s*\[\s*", r"\s*,\s*", r"\s*\]\s*\Z"))


def iter_array(path: Path, wanted: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each element of a JSON array of objects, as text, which takes the least memory, and parsed.

    Raises:
        ValueError: The file is not one, but should be `wanted`.
    """
    check_file(path, wanted)
    refuse_other(path, wanted, "visual_genome")
    try:
        content = path.read_bytes()
        content = content.decode(json.detect_encoding(content), "surrogatepass")  # frees the bytes
        begin, scan = _BEGIN.match(content), json.JSONDecoder().raw_decode
        if begin is None:
            raise ValueError("it is not an array")
        place = begin.end()
        while not _END.match(content, place):
            value, stop = scan(content, place)
            if not isinstance(value, dict):
                raise ValueError(f"it holds {str(value)[:40]!r}, not an object")
            yield content[place:stop], value
            comma = _COMMA.match(content, stop)
            if comma is None and not _END.match(content, stop):
                raise ValueError(f"it ends or breaks at letter {stop}")
            place = stop if comma is None else comma.end()
    except ValueError as error:
        raise ValueError(f"{path} is not {wanted} ({error})") from error


def find(annotations: Path, images: Path, image_data: Path, attributes: Path | None = None, **boxes: Any) -> Found:
    """Return one record per entry of the annotations, in order. For `boxes` see `list_records`.

    Raises:
        ValueError: A file is not what it should be, or `images` is not a folder.
    """
    places = {to_key(row.get("image_id")): row for _, row in iter_array(image_data, "Visual Genome's image_data.json")}
    described: dict[str | None, str] = {}
    if attributes is not None:
        for text, entry in iter_array(attributes, "Visual Genome's attributes.json"):
            described[_image_id(entry)] = text
    rows: list[tuple[str, str, Parse]] = []
    for position, (text, entry) in enumerate(iter_array(annotations, _WANTED)):
        if not any(name in entry for name in _LISTS):
            raise ValueError(f"{annotations} is not {_WANTED}: entry {position} has the keys {sorted(entry)}")
        key = _image_id(entry)
        parse = partial(_parse, text, places.get(key), described.get(key), images)
        rows.append((key or "", f"{annotations.name}: entry {position}", parse))
    return Found(list_records(images, rows, **boxes))


def _image_id(entry: Mapping[str, Any]) -> str | None:
    return to_key(entry.get("image_id", entry.get("id")))


def _parse(text: str, place: Mapping[str, Any] | None, described: str | None, root: Path) -> Record:
    entry = json.loads(text)
    if place is None:
        raise BadRecord("unknown image", f"image_data.json has no image {_image_id(entry)!r}")
    items = [] if described is None else json.loads(described).get("attributes") or []
    words = {to_key(item.get("object_id")): item.get("attributes") or [] for item in items}
    kind = next(name for name in _LISTS if name in entry)
    objects, labels = [], []
    for position, item in enumerate(entry[kind] or []):
        item = parse_dict(item, f"{kind}[{position}]")
        key = to_key(item.get("region_id" if kind == "regions" else "object_id"))
        labels.append(f"{kind.removesuffix('s')} {key or position}")
        try:
            objects.append(Object(_parse_box(item), _caption(item, words.get(key, item.get("attributes") or []))))
        except BadRecord as error:
            raise BadRecord(error.reason, f"{labels[-1]}: {error.detail}") from error
    size = parse_size(place.get("width"), place.get("height"))
    return Record(name_of_url(parse_text(place.get("url"), "url"), root), objects or None, size, labels=labels)


def _caption(item: Mapping[str, Any], attributes: list[Any]) -> str:
    if "phrase" in item:
        return parse_text(item["phrase"], "phrase")
    names = item.get("names") or [item.get("name")]
    words = [parse_text(word, "an attribute") for word in attributes]
    return " ".join(dict.fromkeys([*words, parse_text(names[0], "the name")]))


def _parse_box(item: Mapping[str, Any]) -> Box:
    """Return the corners; a region states its width and height in full, an object by letter."""
    names = ("x", "y", "width", "height") if "width" in item else ("x", "y", "w", "h")
    x, y, width, height = (parse_number(item.get(name), "malformed box") for name in names)
    return x, y, x + width, y + height


def main() -> None:
    """Run the command line."""
    parser = build_parser("visual_genome", __doc__)
    parser.add_argument(
        "--annotations", type=input_path, required=True, metavar="FILE", help="of regions or of objects"
    )
    parser.add_argument(
        "--images", type=input_path, required=True, metavar="DIR", help="holds VG_100K, VG_100K_2, or all"
    )
    parser.add_argument(
        "--image-data", type=input_path, metavar="FILE", help="default: image_data.json in the same folder"
    )
    parser.add_argument("--attributes", type=input_path, metavar="FILE", help="attributes.json, for those of objects")
    add_box_options(parser)
    run(
        parser,
        lambda args: find(
            args.annotations,
            args.images,
            args.image_data or args.annotations.with_name("image_data.json"),
            args.attributes,
            **box_options(args),
        ),
    )


if __name__ == "__main__":
    main()
