"""What makes a chat good: its turns, its texts, and the placeholders in them."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from convert.items import BadRecord
from recipe.schema import Message

ROLES = ("system", "user", "assistant")
IMAGE_PLACEHOLDER = "<image>"
CONTROL_TOKEN = re.compile(r"<\|\w+\|>")  # such as <|im_end|>: it would break a conversation apart
QWEN_MARK = re.compile(r"<\|(object_ref|box|quad)_(start|end)\|>")  # of Qwen's own boxes: harmless in a chat
PLACEHOLDER = re.compile(r"(<ref-object>|<bbox>)")


def parse_messages(value: Any) -> list[Message] | None:
    """Return a chat of text or lists of text and image parts, None for none, or raise `BadRecord`."""
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise BadRecord("malformed messages", f"{value!r} is not a list of messages")
    for position, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise BadRecord("malformed messages", f"{message!r} lacks a role of {ROLES}")
        if message["role"] == "system" and position:
            raise BadRecord("malformed messages", "a system turn that is not the first")
        if not all(map(_is_part, message_parts(message))):
            raise BadRecord("malformed messages", f"the content of {message!r} is neither text nor parts")
    if not any(message["role"] == "user" for message in value):
        raise BadRecord("malformed messages", "no user turn")
    return value


def message_parts(message: Message) -> list[Any]:
    """Return the content of a message as a list of parts; `<image>` in a user's plain text is an image part."""
    content = message.get("content")
    if not isinstance(content, str):
        return content if isinstance(content, list) else [content]
    texts = content.split(IMAGE_PLACEHOLDER) if message["role"] == "user" else [content]
    parts = [part for text in texts for part in ({"type": "image"}, {"type": "text", "text": text})]
    return parts[1:]


def fill_placeholders(
    messages: Sequence[Message], texts: Sequence[str], boxes: Sequence[dict[str, Any]]
) -> list[Message]:
    """Replace the first `<ref-object>` by the first text and so on, and each `<bbox>` by the next part of a box.

    A single text replaces every `<ref-object>`. The encoder writes the boxes in the form of its run.

    Raises:
        BadRecord: There are more placeholders than texts or boxes.
    """
    parts = [part for message in messages for part in message_parts(message)]
    wanted = Counter(PLACEHOLDER.findall("\n".join(part.get("text", "") for part in parts)))
    if len(texts) == 1:
        texts = [texts[0]] * wanted["<ref-object>"]
    for placeholder, values in (("<ref-object>", texts), ("<bbox>", boxes)):
        if wanted[placeholder] > len(values):
            detail = f"messages hold {wanted[placeholder]} {placeholder}, objects only {len(values)}: make them equal"
            raise BadRecord("placeholder without a value", detail)
    next_text, next_box = iter(texts), iter(boxes)
    filled: list[Message] = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message_parts(message):
            for piece in PLACEHOLDER.split(part["text"]) if part["type"] == "text" else [part]:
                if piece == "<bbox>":
                    content.append(next(next_box))
                elif isinstance(piece, dict):
                    content.append(piece)
                elif piece:
                    content.append({"type": "text", "text": next(next_text) if piece == "<ref-object>" else piece})
        filled.append({**message, "content": content} if wanted else message)
    return filled


def _is_part(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, dict) else None
    return kind == "image" or (kind == "text" and isinstance(part.get("text"), str))


def check_messages(messages: Sequence[Message], num_images: int) -> None:
    """Refuse what training would refuse: control tokens, and another number of placeholders than of images, or none."""
    parts = [part for message in messages for part in message_parts(message)]
    for part in parts:
        check_text(QWEN_MARK.sub("", part.get("text", "")))
    found = sum(part["type"] == "image" for part in parts)
    if found not in (0, num_images):
        raise BadRecord("malformed messages", f"{found} image placeholders and {num_images} images")


def check_text(text: str) -> None:
    """Raise `BadRecord` if the text cannot be tokenized, or holds a token that steers a conversation."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord("text beyond Unicode", repr(text)) from error
    token = CONTROL_TOKEN.search(text)
    if token is not None:
        raise BadRecord("control token in a text", token.group())
