"""Boxes of a chat, in its text or for its placeholders: named, and made parts, so that they follow the resize."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from convert.chats import PLACEHOLDER, fill_placeholders, message_parts
from convert.items import BadRecord, Note
from convert.jsonl import parse_bbox_type, parse_objects
from convert.records import parse_box, parse_dict, parse_text
from convert.several import box_part, owners_of_turns, parse_owners
from recipe.schema import Box, Message, Object

_NUMBER = r"\s*-?\d+(?:\.\d+)?\s*"
_FOUR = rf"\[({_NUMBER}),({_NUMBER}),({_NUMBER}),({_NUMBER})\]"
_CORNERS = rf"\(({_NUMBER}),({_NUMBER})\)\s*,?\s*\(({_NUMBER}),({_NUMBER})\)"
# Of Qwen2-VL and of Qwen-VL.
_TOKENS = re.compile(
    r"(?:<\|object_ref_start\|>|<ref>)(?P<name>.*?)(?:<\|object_ref_end\|>|</ref>)"
    rf"|(?:<\|box_start\|>|<box>){_CORNERS}(?:<\|box_end\|>|</box>)",
    re.DOTALL,
)
_JSON_BOX = re.compile(rf'"bbox_2d"\s*:\s*{_FOUR}')
_JSON_KEY = re.compile(r'"bbox_2d"\s*:\s*')
_PLAIN = re.compile(rf"{_FOUR}|{_CORNERS}")
# Each begins with one of a few letters, which `re` finds fast.
_LEFT = re.compile(
    rf'[\[(<"](?:(?<=\[){_FOUR[2:]}|(?<=\(){_CORNERS[2:]}|(?<=<)(?:\|(?:box|quad)_start\|>|box>|quad>)'
    r'|(?<=")bbox\w*"\s*:\s*[^\s\0])'
)
_DECODER = json.JSONDecoder()
_LABELS = ("label", "desc", "text_content")
Owned = list[tuple[Object, int]]  # objects, each with the number of its image, from 0


class _Found(NamedTuple):
    """A box of a text, or a name (`box` is None) that takes the place of Qwen's marks around it."""

    start: int
    end: int
    name: str | None
    box: Box | None
    is_token: bool = False


def read_boxes(
    messages: Sequence[Message], stated: str | None, notes: list[Note], num_images: int = 1
) -> tuple[list[Message], Owned | None, str | None]:
    """Return the chat with its boxes as parts, the boxes of its answers as objects, and their unit if it is theirs.

    For the image of a box see `owners_of_turns`; if that is not known, the boxes of the message stay text.

    Read are Qwen's tokens, in thousandths unless `stated` (of `BBOX_TYPES`) says otherwise, the key `bbox_2d` of JSON
    in answers, and, only if `stated`, any four numbers in brackets. Other boxes stay text, with a note. The objects are
    None if there are no boxes, or if one of them has no name or could not be read.
    """
    read: list[Message] = []
    objects: Owned = []
    unnamed, is_left, num_unplaced, kinds, asked = 0, False, 0, set(), set()
    for message, owner in zip(messages, owners_of_turns(messages, num_images), strict=True):
        is_answer, content = message["role"] == "assistant", []
        name = next(iter(asked)) if is_answer and len(asked) == 1 else None  # a question may name its answer's boxes
        asked = asked if is_answer else set()
        for part in message_parts(message):
            if part["type"] != "text":
                content.append(part)
                continue
            text, position, rest = part["text"], 0, []
            boxes = _find(text, is_answer, stated is not None)
            if owner is None:
                num_unplaced += sum(found.box is not None for found in boxes)
                boxes = []
            for found in boxes:
                rest.append(text[position : found.start])
                content.append({"type": "text", "text": rest[-1]})
                position = found.end
                if found.box is None:
                    name = found.name
                    asked |= set() if is_answer else {name}
                    content.append({"type": "text", "text": name})
                    continue
                kinds.add(found.is_token)
                content.append(box_part(found.box, owner or 0, num_images))
                caption = name if found.is_token else found.name
                if is_answer and caption:
                    objects.append((Object(found.box, caption), owner or 0))
                unnamed += is_answer and not caption
            rest.append(text[position:])
            content.append({"type": "text", "text": rest[-1]})
            is_left = is_left or _LEFT.search("\0".join(rest)) is not None
        read.append({**message, "content": _joined(content)})
    if len(kinds) == 2 and stated is None:  # two units
        is_left, kinds = True, set()
    if num_unplaced:
        notes.append(Note("chats with boxes of one of several images, which is not said: left in their text", 1))
    elif is_left:
        notes.append(Note("chats with boxes left in their text, which do not follow a resize", 1))
    if not kinds:
        return list(messages), None, None
    if unnamed:
        notes.append(Note("chats with answered boxes that have no name: not annotated", 1))
    is_whole = objects and not unnamed and not is_left and not num_unplaced
    unit = "norm1000" if stated is None and True in kinds else None
    return read, list(dict.fromkeys(objects)) if is_whole else None, unit


def _find(text: str, is_answer: bool, with_plain: bool) -> list[_Found]:
    """Return what is found in a text, in order."""
    found = []
    for match in _TOKENS.finditer(text) if "<" in text else ():
        name, *corners = match.groups()
        box = None if corners[0] is None else _box(corners)
        found.append(_Found(*match.span(), None if box else name.strip(), box, is_token=True))
    if is_answer and not found:
        found = list(_find_json(text))
    if with_plain and not found:
        for match in _PLAIN.finditer(text):
            box = _box([value for value in match.groups() if value is not None])
            if box[0] < box[2] and box[1] < box[3]:
                found.append(_Found(*match.span(), None, box))
    return found


def _find_json(text: str) -> Iterator[_Found]:
    """Yield the boxes of JSON in an answer, also in a fence or between words; none if one of them cannot be read."""
    position, rows = 0, []
    if '"bbox_2d"' not in text:
        return
    while (start := min((at for mark in "[{" if (at := text.find(mark, position)) >= 0), default=-1)) >= 0:
        try:
            value, position = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            position = start + 1
            continue
        rows += [row for row in (value if isinstance(value, list) else [value]) if isinstance(row, dict)]
    rows = [row for row in rows if "bbox_2d" in row]
    matches = list(_JSON_BOX.finditer(text))
    if not len(rows) == len(matches) == len(_JSON_KEY.findall(text)):
        return
    for row, match in zip(rows, matches, strict=True):
        label = row.get("label")
        if not isinstance(label, str):
            label = next((row[key] for key in _LABELS if isinstance(row.get(key), str)), "")
        yield _Found(match.start(1) - 1, match.end(), label.strip() or None, _box(row["bbox_2d"]))


def _box(values: Sequence[Any]) -> Box:
    x1, y1, x2, y2 = map(float, values)
    return x1, y1, x2, y2


def _joined(content: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the parts with neighbouring texts in one, so that they are tokenised as they were written."""
    joined: list[dict[str, Any]] = []
    for part in content:
        if part["type"] == "text" and joined and joined[-1]["type"] == "text":
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + part["text"]}
        elif part["type"] != "text" or part["text"]:
            joined.append(part)
    return joined


def fill_boxes(
    messages: Sequence[Message], value: Any, notes: list[Note], num_images: int = 1
) -> tuple[list[Message], Owned | None, str | None]:
    """Return the chat with its placeholders filled from `objects`, the objects, and what their boxes are if they say.

    An object that does not name its image has that of `owners_of_turns` at its `<bbox>`.

    `objects` is as in convert.jsonl, or as in ms-swift, which ties no number of `ref` to that of `bbox`, and whose
    version 2 wrote a list of `caption` and `bbox`, as text.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRecord("malformed record", f"objects is text, but not JSON: {error}") from error
    unit = None
    if isinstance(value, list) and any(isinstance(item, dict) and "bbox" in item for item in value):  # ms-swift 2
        rows = [parse_dict(item, "an object") for item in value]
        unit = next((str(row["bbox_type"]).replace("norm_", "norm") for row in rows if row.get("bbox_type")), None)
        parse_bbox_type({"bbox_type": unit})
        value = {"ref": [row.get("caption", row.get("ref")) for row in rows], "bbox": [row.get("bbox") for row in rows]}
        value["image_id"] = [row.get("image") for row in rows]
    refs, boxes = (value.get("ref") or [], value.get("bbox") or []) if isinstance(value, dict) else ([], [])
    objects: list[Object] | None = None
    if len(refs) == len(boxes) or (len(refs) == 1 and boxes):
        texts, objects = parse_objects(value)
        corners = [item.box for item in objects or ()]
    else:
        texts, corners = [parse_text(ref, "ref") for ref in refs], list(map(parse_box, boxes))
        names = _name_boxes(messages, texts)
        if len(names) == len(boxes) and all(names):
            objects = [Object(box, name) for box, name in zip(corners, names, strict=True)]
        else:
            notes.append(Note("chats whose boxes have no name: not annotated", 1))
    owners = parse_owners(value, num_images) or _owners_of_boxes(messages, len(corners), num_images)
    parts = [box_part(box, owner, num_images) for box, owner in zip(corners, owners, strict=True)]
    filled = fill_placeholders(messages, texts, parts)
    return filled, None if objects is None else list(dict.fromkeys(zip(objects, owners, strict=True))), unit


def _owners_of_boxes(messages: Sequence[Message], num_boxes: int, num_images: int) -> list[int]:
    """Return the image of each `<bbox>`, or raise `BadRecord`."""
    if num_images <= 1:
        return [0] * num_boxes
    owners: list[int | None] = []
    for message, owner in zip(messages, owners_of_turns(messages, num_images), strict=True):
        text = "\n".join(part.get("text", "") for part in message_parts(message))
        owners += [owner] * text.count("<bbox>")
    known = [owner for owner in owners if owner is not None]
    if len(owners) != num_boxes or len(known) != num_boxes:
        raise BadRecord("box of an unknown image", f"{num_images} images: say it in image_id of objects, from 0")
    return known


def _name_boxes(messages: Sequence[Message], texts: Sequence[str]) -> list[str]:
    """Return the name of each `<bbox>`: the last `<ref-object>` before it in its turn, or the only one of the question.

    It is empty if there is none.
    """
    names, left, asked = [], iter(texts), []
    for message in messages:
        is_answer = message["role"] == "assistant"
        name, asked = asked[0] if is_answer and len(asked) == 1 else "", asked if is_answer else []
        for piece in PLACEHOLDER.findall("\n".join(part.get("text", "") for part in message_parts(message))):
            if piece == "<bbox>":
                names.append(name)
                continue
            name = next(left, "")
            asked += [] if is_answer else [name]
    return names
