"""JSON lines → MDS.

    python -m convert.jsonl --annotations train.jsonl --images DIR --out OUT --split train

One record per line, boxes xyxy in absolute pixels of the displayed image:

    {"id": "a", "images": ["a.jpg"], "objects": [{"bbox_2d": [x1, y1, x2, y2], "desc": "a red car"}],
     "messages": [{"role": "user", "content": "..."}, ...], "width": 640, "height": 480}

`objects` may also be parallel lists: `{"ref": ["a red car"], "bbox": [[x1, y1, x2, y2]]}`. Absent or null `objects`:
not annotated; empty: known to hold nothing. A record without an image is text only and needs `messages`. All keys
but these are ignored. The default id is FILE-LINE, the line counted from 1.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from convert.items import Found
from convert.records import (
    BadRecord,
    Parse,
    Record,
    check_file,
    list_records,
    parse_box,
    parse_dict,
    parse_messages,
    parse_number,
    parse_text,
)
from convert.write import build_parser, run
from recipe.schema import Object


def find(annotations: Path, images: Path) -> Found:
    """Return one record per line; blank lines are skipped. Paths are relative to the folder `images`.

    Raises:
        ValueError: `annotations` is not a file, or `images` is not a folder.
    """
    check_file(annotations, "a file of JSON lines")
    return Found(list_records(images, _rows(annotations)))


def _rows(annotations: Path) -> Iterator[tuple[str, str, Parse]]:
    """Yield the lines with only their id parsed: as text they take a fraction of the memory."""
    with annotations.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            sample_id = f"{annotations.stem}-{number:06d}"
            with suppress(BadRecord):  # parsing it again reports it
                sample_id = _parse_id(_parse_line(line)) or sample_id
            yield sample_id, f"{annotations.name}: line {number}", partial(_parse, line)


def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        start = line[:60].decode(errors="replace").strip()
        raise BadRecord("malformed json", f"{start!r} is not one JSON object on one line ({error})") from error
    return parse_dict(value, "the line")


def _parse_id(entry: dict[str, Any]) -> str | None:
    sample_id = entry.get("id")
    if sample_id is None:
        return None
    if isinstance(sample_id, bool) or not isinstance(sample_id, int | str) or sample_id == "":
        raise BadRecord("malformed record", f"id is {sample_id!r}, not text or a whole number")
    return str(sample_id)


def _parse(line: bytes) -> Record:
    entry = _parse_line(line)
    _parse_id(entry)
    size = None
    if entry.get("width") is not None or entry.get("height") is not None:
        size = (parse_number(entry.get("width")), parse_number(entry.get("height")))
    names = entry.get("images")
    if "image" in entry and not names:
        raise BadRecord("malformed record", 'has "image": the key is "images", a list of one path')
    image = None
    if names is not None and names != []:
        if not isinstance(names, list):
            raise BadRecord("malformed record", f"images is {names!r}, not a list of one path")
        if len(names) > 1:
            raise BadRecord("more than one image", f"{len(names)} images")
        image = parse_text(names[0], "images[0]")
    return Record(image, _parse_objects(entry.get("objects")), size, parse_messages(entry.get("messages")))


def _parse_objects(value: Any) -> list[Object] | None:
    if value is None:
        return None
    if isinstance(value, list):
        pairs = [(parse_dict(item, "an object").get("desc"), item.get("bbox_2d")) for item in value]
    else:
        texts, boxes = parse_dict(value, "objects").get("ref"), value.get("bbox")
        if not isinstance(texts, list) or not isinstance(boxes, list):
            raise BadRecord("malformed record", "objects lacks the lists ref and bbox")
        if len(texts) != len(boxes):
            raise BadRecord("unequal lengths", f"objects has {len(texts)} ref and {len(boxes)} bbox")
        pairs = list(zip(texts, boxes, strict=True))
    return [Object(parse_box(box), parse_text(text, "the text of an object")) for text, box in pairs]


def main() -> None:
    """Run the command line."""
    parser = build_parser("jsonl", __doc__)
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="the file of JSON lines")
    parser.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="folder of the images: their paths are relative to it"
    )
    run(parser, lambda args: find(args.annotations, args.images))


if __name__ == "__main__":
    main()
