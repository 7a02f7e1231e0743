"""JSON lines → MDS.

    python -m convert.jsonl --annotations train.jsonl --images DIR --out OUT --split train

One record a line, boxes xyxy in absolute pixels of the displayed picture:

    {"id": "a", "images": ["a.jpg"], "objects": [{"bbox_2d": [x1, y1, x2, y2], "desc": "a red car"}],
     "messages": [{"role": "user", "content": "..."}, ...], "width": 640, "height": 480}

`objects` may also be parallel lists: `{"ref": ["a red car"], "bbox": [[x1, y1, x2, y2]]}`. Absent or null `objects`:
not annotated; empty: known to hold nothing. A record without a picture is text only and needs `messages`. All keys
but these are ignored. The default id is FILE-LINE, the line counted from 1.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from convert.records import (
    BadRecord,
    Record,
    RecordReader,
    parse_box,
    parse_dict,
    parse_messages,
    parse_number,
    parse_text,
)
from convert.writer import Item, build_parser, run
from recipe.schema import Object


def iter_samples(annotations: Path, images: Path) -> Iterator[Item]:
    """One item a line; blank lines are passed over.

    Args:
        annotations: File of JSON lines.
        images: Folder that `images` are relative to.

    Raises:
        ValueError: `images` is no folder.
    """
    reader = RecordReader(images)
    with annotations.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            source, default_id = f"{annotations.name}: line {number}", f"{annotations.stem}-{number:06d}"
            try:
                entry, sample_id = _parse_line(line, default_id)
                parse = partial(_parse, entry)
            except BadRecord as error:
                sample_id, parse = default_id, partial(_fail, error)
            yield from reader.read(sample_id, source, parse)


def _parse_line(line: bytes, default_id: str) -> tuple[dict[str, Any], str]:
    try:
        entry = parse_dict(json.loads(line), "the line")
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadRecord("malformed json", error) from error
    sample_id = entry.get("id")
    if sample_id is None:
        return entry, default_id
    if isinstance(sample_id, bool) or not isinstance(sample_id, int | str) or sample_id == "":
        raise BadRecord("malformed record", f"id is {sample_id!r}, not text or a whole number")
    return entry, str(sample_id)


def _fail(error: BadRecord) -> Record:
    raise error


def _parse(entry: dict[str, Any]) -> Record:
    size = None
    if entry.get("width") is not None or entry.get("height") is not None:
        size = (parse_number(entry.get("width")), parse_number(entry.get("height")))
    return Record(
        _parse_images(entry), _parse_objects(entry.get("objects")), size, parse_messages(entry.get("messages"))
    )


def _parse_images(entry: dict[str, Any]) -> str | None:
    names = entry.get("images")
    if "image" in entry and not names:
        raise BadRecord("malformed record", 'has "image": the key is "images", a list of one path')
    if names is None or names == []:
        return None
    if not isinstance(names, list):
        raise BadRecord("malformed record", f"images is {names!r}, not a list of one path")
    if len(names) > 1:
        raise BadRecord("more than one image", f"{len(names)} images")
    return parse_text(names[0], "images[0]")


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
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--annotations", type=Path, required=True, help="the file of JSON lines")
    parser.add_argument("--images", type=Path, required=True, help="folder that images are relative to")
    args = parser.parse_args()
    run(iter_samples(args.annotations, args.images), args, args.split)


if __name__ == "__main__":
    main()
