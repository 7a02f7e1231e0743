"""JSON lines → MDS.

    python -m convert.jsonl --annotations train.jsonl --images DIR --out OUT --split train

One record per line, boxes xyxy in absolute pixels of the displayed image:

    {"id": "a", "images": ["a.jpg"], "objects": [{"bbox_2d": [x1, y1, x2, y2], "desc": "a red car"}],
     "messages": [{"role": "user", "content": "..."}, ...], "width": 640, "height": 480}

`desc` may also be called `label`. `objects` may also be parallel lists, with one `ref` per `bbox` or one for all:
`{"ref": ["a red car"], "bbox": [[x1, y1, x2, y2]], "bbox_type": "real"}`. In `messages`, `<ref-object>` and `<bbox>`
are replaced by the next ref (or desc) and box. Absent or null `objects`: not annotated; empty: known to hold nothing. A
record without an image is text only and needs `messages`. Other keys are not read, but counted; a record of `images`
and other keys alone is rejected. The default id is FILE-LINE, the line counted from 1. One JSON array of records is
read too.
"""

from pathlib import Path
from typing import Any

from convert.chats import fill_placeholders, parse_messages
from convert.items import BadRecord, Found, Note
from convert.lines import find_lines
from convert.records import BBOX_TYPES, Record, parse_box, parse_dict, parse_size, parse_text
from convert.write import add_box_options, box_options, build_parser, run
from recipe.schema import Object

_KEYS = {"id", "images", "image", "objects", "messages", "width", "height", "bbox_type"}
CHAT_KEYS = {"conversations", "conversation", "query", "instruction"}  # of other tools, see `convert/chat.py`


def find(annotations: Path, images: Path, **options: Any) -> Found:
    """Return one record per line; see `find_lines`, also for `options`."""
    return find_lines(annotations, images, _parse, ("jsonl", "chat"), **options)


def _parse(entry: dict[str, Any]) -> Record:
    unread = sorted(entry.keys() - _KEYS)
    if unread and entry.get("objects") is None and entry.get("messages") is None:
        remedy = "give objects or messages, as in convert/README.md"
        if entry.keys() & CHAT_KEYS:
            remedy = "read the chats of other tools with python -m convert.chat"
        raise BadRecord("neither objects nor messages", f"the keys {unread} are not read: {remedy}")
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
    texts, objects = parse_objects(entry.get("objects"))
    messages = parse_messages(entry.get("messages"))
    if messages is not None:
        messages = fill_placeholders(messages, texts, [item.box for item in objects or ()])
    notes = [Note(f"records with the key {key!r}, which is not read", 1) for key in unread]
    if objects is not None and isinstance(entry["objects"], dict):
        # Lists that fill placeholders name an object as often as the chat does.
        unique = list(dict.fromkeys(objects))
        if len(unique) < len(objects):
            notes.append(Note("objects listed twice, taken once", len(objects) - len(unique)))
        objects = unique
    return Record(
        image,
        objects,
        size=parse_size(entry.get("width"), entry.get("height")),
        messages=messages,
        bbox_type=parse_bbox_type(entry),
        notes=tuple(notes),
    )


def parse_objects(value: Any) -> tuple[list[str], list[Object] | None]:
    """Return the texts that replace `<ref-object>`, and the objects in the order that `<bbox>` names them."""
    if value is None:
        return [], None
    if isinstance(value, list):
        objects = [_parse_object(parse_dict(item, "an object")) for item in value]
        return [item.caption for item in objects], objects
    refs, boxes = parse_dict(value, "objects").get("ref"), value.get("bbox")
    if not isinstance(refs, list) or not isinstance(boxes, list):
        raise BadRecord("malformed record", f"objects lacks the lists ref and bbox: it has the keys {sorted(value)}")
    if len(refs) != len(boxes) and not (len(refs) == 1 and boxes):
        counts = f"objects has {len(refs)} ref and {len(boxes)} bbox"
        raise BadRecord("unequal lengths", f"{counts}: write one ref per bbox, or a single ref for all")
    texts = [parse_text(text, "ref") for text in refs]
    names = texts if len(texts) == len(boxes) else texts * len(boxes)
    return texts, [Object(parse_box(box), text) for box, text in zip(boxes, names, strict=True)]


def _parse_object(item: dict[str, Any]) -> Object:
    text = item.get("label") if item.get("desc") is None else item["desc"]
    if text is None or item.get("bbox_2d") is None:
        raise BadRecord("malformed record", f"an object needs bbox_2d and desc, but has the keys {sorted(item)}")
    return Object(parse_box(item["bbox_2d"]), parse_text(text, "the text of an object"))


def parse_bbox_type(entry: dict[str, Any]) -> str | None:
    """Return what the record says of its boxes, next to them or in `objects`."""
    objects = entry.get("objects")
    stated = [place.get("bbox_type") for place in (entry, objects) if isinstance(place, dict)]
    kinds = [kind for kind in stated if kind is not None]
    if any(kind not in list(BBOX_TYPES) or kind != kinds[0] for kind in kinds):
        raise BadRecord("malformed record", f"bbox_type is {kinds}: write one of {', '.join(BBOX_TYPES)}")
    return kinds[0] if kinds else None


def main() -> None:
    """Run the command line."""
    parser = build_parser("jsonl", __doc__)
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="the file of JSON lines")
    parser.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="folder of the images: their paths are relative to it"
    )
    add_box_options(parser)
    run(parser, lambda args: find(args.annotations, args.images, **box_options(args)))


if __name__ == "__main__":
    main()
