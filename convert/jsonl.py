"""JSON lines → MDS.

    python -m convert.jsonl --annotations train.jsonl [--images DIR] --out OUT --split train

One record per line, boxes xyxy in absolute pixels of the displayed image:

    {"id": "a", "images": ["a.jpg"], "objects": [{"bbox_2d": [x1, y1, x2, y2], "desc": "a red car"}],
     "messages": [{"role": "user", "content": "..."}, ...], "width": 640, "height": 480}

`desc` may also be called `label`. `objects` may also be parallel lists, with one `ref` per `bbox` or one for all:
`{"ref": ["a red car"], "bbox": [[x1, y1, x2, y2]], "bbox_type": "real"}`. In `messages`, `<ref-object>` and `<bbox>`
are replaced by the next ref (or desc) and box. `images` names several if `messages` are about them: then every object
has `image`, its image's number from 0, and `empty_images` lists those that are known to hold nothing. Absent or null
`objects`: not annotated; empty: known to hold nothing. A record without an image is text only and needs `messages`.
Other keys are not read, but counted; a record of `images` and other keys alone is rejected. The default id is
FILE-LINE, the line counted from 1. One JSON array of records is read too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.chats import fill_placeholders, parse_messages
from convert.items import BadRecord, Found, Note
from convert.lines import find_lines
from convert.records import BBOX_TYPES, Record, parse_box, parse_dict, parse_size, parse_text
from convert.remote import input_path
from convert.several import box_part, make_record, parse_owners
from convert.write import add_box_options, box_options, build_parser, run
from recipe.schema import Object

_KEYS = {"id", "images", "image", "objects", "messages", "width", "height", "bbox_type", "empty_images"}
CHAT_KEYS = {"conversations", "conversation", "query", "instruction"}  # of other tools, see `convert/chat.py`


def find(annotations: Path, images: Path | None, **options: Any) -> Found:
    """Return one record per line; see `find_lines`, also for `options`."""
    return find_lines(annotations, images, _parse, ("jsonl", "chat"), **options)


def _parse(entry: dict[str, Any]) -> Record:
    unread = sorted(entry.keys() - _KEYS)
    if unread and entry.get("objects") is None and entry.get("messages") is None:
        remedy = "give objects or messages, as in convert/README.md"
        if entry.keys() & CHAT_KEYS:
            remedy = "read the chats of other tools with python -m convert.chat"
        raise BadRecord("neither objects nor messages", f"the keys {unread} are not read: {remedy}")
    names = entry.get("images") or []
    if "image" in entry and not names:
        raise BadRecord("malformed record", 'has "image": the key is "images", a list of paths')
    if not isinstance(names, list):
        raise BadRecord("malformed record", f"images is {names!r}, not a list of paths")
    images = [parse_text(name, f"images[{number}]") for number, name in enumerate(names)]
    texts, objects = parse_objects(entry.get("objects"))
    owners = parse_owners(entry.get("objects"), len(images))
    if owners is None and objects and len(images) > 1:
        raise BadRecord("malformed record", f"which of {len(images)} images is each object of? Number it as in README")
    owners = owners or [0 for _ in objects or ()]
    messages = parse_messages(entry.get("messages"))
    if messages is not None:
        named = zip(objects or (), owners, strict=True)
        messages = fill_placeholders(messages, texts, [box_part(item.box, owner, len(images)) for item, owner in named])
    notes = [Note(f"records with the key {key!r}, which is not read", 1) for key in unread]
    if objects is not None and isinstance(entry["objects"], dict):
        # Lists that fill placeholders name an object as often as the chat does.
        unique = list(dict.fromkeys(zip(objects, owners, strict=True)))
        if len(unique) < len(objects):
            notes.append(Note("objects listed twice, taken once", len(objects) - len(unique)))
        objects, owners = [item for item, _ in unique], [owner for _, owner in unique]
    return make_record(
        images,
        objects,
        owners,
        _parse_empty(entry.get("empty_images"), owners, len(images)),
        size=parse_size(entry.get("width"), entry.get("height")),
        messages=messages,
        bbox_type=parse_bbox_type(entry),
        notes=tuple(notes),
    )


def _parse_empty(value: Any, owners: Sequence[int], num_images: int) -> list[int]:
    """Return the numbers of the images, from 0, that a record of several says hold nothing."""
    numbers = [] if value is None else value
    known = [number for number in range(num_images) if number not in owners] if num_images > 1 else []
    if not isinstance(numbers, list) or any(type(number) is not int or number not in known for number in numbers):
        raise BadRecord("malformed record", f"empty_images is {value!r}: list some of {known}, which have no object")
    return numbers


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
    parser.add_argument("--annotations", type=input_path, required=True, metavar="FILE", help="the file of JSON lines")
    parser.add_argument(
        "--images",
        type=input_path,
        metavar="DIR",
        help="folder of the images: their paths are relative to it; not needed for texts alone",
    )
    add_box_options(parser)
    run(parser, lambda args: find(args.annotations, args.images, **box_options(args)))


if __name__ == "__main__":
    main()
