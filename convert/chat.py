"""Chats with images, as other tools write them → MDS.

    python -m convert.chat --annotations train.json [--images DIR] --out OUT --split train

A JSON array or JSON lines, one conversation per record, with its images (`image`, `images`, or in a message):

    Qwen, LLaVA      conversations: [{"from": "human", "value": "<image>..."}, {"from": "gpt", "value": "..."}]
    LLaMA-Factory    conversations or messages; or instruction, input, output, history, system
    ms-swift         messages; or query, response, history, system; `<ref-object>` and `<bbox>` with `objects`

Without `objects`, boxes in answers are read where they can be: JSON with `bbox_2d` and `label`, in pixels of the
displayed image, and Qwen's `<|object_ref_start|>...<|box_start|>(x1,y1),(x2,y2)<|box_end|>`, in thousandths. They are
the image's objects, and follow its resize as `<bbox>` of convert.jsonl does. With `bbox_type` in the record, or
--bbox-type, all boxes are that, and others in brackets follow the resize too. What cannot be read stays text, and is
counted. Of several images, a box is of the one that `objects` names, else of the only one of the last question with
images. If ids repeat, FILE-LINE is the id of every record.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

from convert.answers import fill_boxes, read_boxes
from convert.chats import fill_placeholders, parse_messages
from convert.items import BadRecord, Found, Note
from convert.jsonl import CHAT_KEYS, parse_bbox_type
from convert.lines import find_lines
from convert.records import Record, parse_dict, parse_size, parse_text
from convert.remote import input_path
from convert.several import image_parts, make_record
from convert.write import add_box_options, box_options, build_parser, run
from recipe.schema import Message

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TURN_KEYS = {"role", "from", "content", "value"}
_KEYS = {"id", "image", "images", "objects", "bbox_type", "system", "width", "height", "history", "messages"}
_KEYS |= CHAT_KEYS | {"response", "input", "output"}
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_INLINE_IMAGE = re.compile(r"(?:\w+ \d+: ?)?<img>(.*?)</img>\n?")
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def find(annotations: Path, images: Path | None, bbox_type: str | None = None, **options: Any) -> Found:
    """Return one record per line or entry; see `find_lines`, also for `options`."""
    parse = partial(_parse, bbox_type)
    return find_lines(annotations, images, parse, ("chat", "jsonl"), bbox_type=bbox_type, renumber=True, **options)


def _parse(stated: str | None, entry: dict[str, Any]) -> Record:
    if other := [key for key in _OTHER_MEDIA if entry.get(key)]:
        raise BadRecord("video or audio", f"the record has the keys {other}: only images are read")
    given = [entry.get(key) for key in ("image", "images")]
    listed = [_read_path(item) for value in given if value for item in (value if isinstance(value, list) else [value])]
    named: list[str] = []
    turns, notes = _read_turns(entry, named)
    messages = parse_messages(turns) or []
    images = [*listed, *(path for path in named if path not in listed)]
    if named and len(named) == image_parts(messages):  # in the order of their places
        images = [*named, *(path for path in listed if path not in named)]
    unread = sorted(key for key in entry.keys() - _KEYS if entry[key])
    notes += [Note(f"records with the key {key!r}, which is not read", 1) for key in unread]
    bbox_type = parse_bbox_type(entry)
    objects, unit = None, None
    if entry.get("objects") is not None:
        messages, objects, unit = fill_boxes(messages, entry["objects"], notes, len(images))
    else:
        fill_placeholders(messages, (), ())  # none may be left
        if images:
            messages, objects, unit = read_boxes(messages, bbox_type or stated, notes, len(images))
    if objects is None and all(message["role"] != "assistant" for message in messages):
        raise BadRecord("malformed messages", "no answer to learn from")
    size = parse_size(entry.get("width"), entry.get("height"))
    owned = None if objects is None else [item for item, _ in objects]
    more = {"size": size, "messages": messages, "bbox_type": bbox_type or unit, "notes": tuple(notes)}
    return make_record(images, owned, [owner for _, owner in objects or ()], **more)


def _read_turns(entry: dict[str, Any], named: list[str]) -> tuple[list[Message], list[Note]]:
    """Return the messages of a record, and add the images that they name to `named`."""
    listed = entry.get("messages") or entry.get("conversations")
    if not isinstance(listed, list):
        listed = []
        for question, answer in _read_pairs(entry):
            listed += [{"role": "user", "content": question}] if question else []
            listed += [{"role": "assistant", "content": answer}] if answer else []
    turns, extra = list[Message](), dict[str, int]()
    for turn in (parse_dict(turn, "a message") for turn in listed):
        role = turn.get("role", turn.get("from"))
        if role not in _ROLES:
            raise BadRecord("malformed messages", f"the role {role!r} is not read: only {', '.join(_ROLES)}")
        extra |= {key: extra.get(key, 0) + 1 for key in turn.keys() - _TURN_KEYS if turn[key] is not None}
        content = turn.get("content", turn.get("value"))
        turns.append({"role": _ROLES[role], "content": _read_content(content, named)})
    if entry.get("system") and not (turns and turns[0]["role"] == "system"):
        turns.insert(0, {"role": "system", "content": parse_text(entry["system"], "system")})
    return turns, [Note(f"messages with the key {key!r}, which is not read", count) for key, count in extra.items()]


def _read_pairs(entry: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Return questions and answers of the forms that are no list of messages."""
    pairs = [tuple(pair) for pair in entry.get("history") or [] if isinstance(pair, list) and len(pair) == 2]
    if len(pairs) != len(entry.get("history") or []):
        raise BadRecord("malformed messages", "history is not a list of pairs [question, answer]")
    if isinstance(entry.get("conversation"), list):
        turns = [parse_dict(pair, "a pair of turns") for pair in entry["conversation"]]
        return [(pair.get("human"), pair.get("assistant")) for pair in turns]
    if entry.keys() & {"query", "response"}:
        return [*pairs, (entry.get("query"), entry.get("response"))]
    if entry.keys() & {"instruction", "output"}:
        asked = filter(None, (entry.get("instruction"), entry.get("input")))
        return [*pairs, ("\n".join(map(str, asked)), entry.get("output"))]
    raise BadRecord("neither objects nor messages", f"no chat under the keys {sorted(entry)}")


def _read_content(content: Any, named: list[str]) -> Any:
    """Return text, or parts without the images that they name, which are added to `named`."""
    if isinstance(content, str):
        if "<img>" in content:
            named += [_read_path(path) for path in _INLINE_IMAGE.findall(content)]
            content = _INLINE_IMAGE.sub("<image>", content)
        return content.replace(_QWEN_IMAGE, "<image>")
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image", "image_url"):
            value = part.get(kind, part.get("image"))
            named += [_read_path(value.get("url") if isinstance(value, dict) else value)] if value else []
            part = {"type": "image"}
        parts.append(part)
    return parts


def _read_path(value: Any) -> str:
    path = parse_text(value.get("path") if isinstance(value, dict) else value, "the path of an image")
    if re.match(r"(https?|data):", path):
        raise BadRecord("missing file", f"{path[:80]!r} is not a file: download it, and name the file")
    return path.removeprefix("file://")


def main() -> None:
    """Run the command line."""
    parser = build_parser("chat", __doc__)
    parser.add_argument(
        "--annotations", type=input_path, required=True, metavar="FILE", help="JSON array or JSON lines"
    )
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
