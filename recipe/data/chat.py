"""The text of a conversation, and the text form of boxes.

A conversation is ChatML as Qwen's own template renders it, cut into segments that are tokenised one by one: so the
prompt has the same ids in training and at inference, and the answers are known spans, never searched for.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipe.config import PromptConfig
from recipe.schema import Box, DetectedObject, Message, Object, Role

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
IMAGE_PLACEHOLDER = "<image>"
GENERATION_PROMPT = "<|im_start|>assistant\n"
END_OF_TURN = "<|im_end|>"
NORMALIZED_FRAME = (1000, 1000)
CONTROL_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation; a role other than NONE makes every token of it supervised."""

    text: str
    role: Role = Role.NONE


def system_segments(system: str) -> list[Segment]:
    """The system turn; none where `system` is empty."""
    return [Segment(_turn("system", checked(system)))] if system else []


def detection_question(prompt: PromptConfig) -> str:
    """The user's turn of a detection chat, up to and including the generation prompt."""
    text = prompt.detect
    if prompt.candidate_phrases:
        text = f"{text} Candidates: {', '.join(prompt.candidate_phrases)}."
    return _turn("user", IMAGE + checked(text)) + GENERATION_PROMPT


def answer_segments(text: str, role: Role) -> list[Segment]:
    """An answer after its generation prompt: the text and its end are supervised, the line break is not."""
    return [Segment(checked(text) + END_OF_TURN, role), Segment("\n")]


def message_segments(messages: Sequence[Message], has_image: bool) -> list[Segment]:
    """A given chat, without its system turn; every assistant turn is supervised as the student's.

    The sample's picture stands where a user turn says `<image>` or holds `{"type": "image"}`, else at the start of
    the first user turn. A chat that ends with a user turn gets a generation prompt and no answer.

    Raises:
        ValueError: A turn is malformed, or pictures and placeholders do not agree.
    """
    turns = [(message.get("role"), _content(message)) for message in messages]
    turns = turns[1:] if turns and turns[0][0] == "system" else turns
    if any(role == "system" for role, _ in turns):
        raise ValueError("`messages` has a system turn that is not the first: move it to the front")
    questions = [position for position, (role, _) in enumerate(turns) if role == "user"]
    if not questions:
        raise ValueError("`messages` holds no user turn: give one, or null for the detection chat")
    found = sum(turns[position][1].count(IMAGE) for position in questions)
    if has_image and found == 0:
        turns[questions[0]] = ("user", IMAGE + turns[questions[0]][1])
    elif found != int(has_image):
        raise ValueError(f"`messages` has {found} image placeholders, but the sample holds {int(has_image)} pictures")
    segments = []
    for role, text in turns:
        if role == "assistant":
            segments += [Segment(GENERATION_PROMPT), Segment(text + END_OF_TURN, Role.STUDENT), Segment("\n")]
        else:
            segments.append(Segment(_turn("user", text)))
    if turns[-1][0] == "user":
        segments.append(Segment(GENERATION_PROMPT))
    return segments


def system_of(messages: Sequence[Message], default: str) -> str:
    """The system text of a given chat, else `default`."""
    return _content(messages[0]) if messages and messages[0].get("role") == "system" else default


def answer_frame(box_coordinates: str, resized_size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) that the integers of an answer are counted in.

    Args:
        box_coordinates: `absolute`: pixels of the resized picture; `normalized_1000`: 0 to 1000.
        resized_size: (width, height) from `recipe.data.image.resized_size`.

    Raises:
        ValueError: Another word.
    """
    if box_coordinates == "absolute":
        return resized_size
    if box_coordinates == "normalized_1000":
        return NORMALIZED_FRAME
    raise ValueError(f"prompt.box_coordinates is {box_coordinates!r}: write absolute or normalized_1000")


def objects_to_text(objects: Iterable[Object], image_size: tuple[int, int], frame_size: tuple[int, int]) -> str:
    """The answer to "detect": a JSON list, top to bottom then left to right, crowd regions left out.

    Args:
        objects: Boxes in pixels of the displayed picture.
        image_size: (width, height) of the displayed picture.
        frame_size: (width, height) the integers are counted in, from `answer_frame`.
    """
    rows = [(_to_frame(item.box, image_size, frame_size), item.caption) for item in objects if not item.iscrowd]
    rows.sort(key=lambda row: (row[0][1], row[0][0]))
    return json.dumps([{"bbox_2d": box, "label": caption} for box, caption in rows], ensure_ascii=False)


def text_to_objects(text: str, image_size: tuple[int, int], frame_size: tuple[int, int]) -> list[DetectedObject] | None:
    """Reads an answer back: the inverse of `objects_to_text`, up to the rounding to integers.

    A code fence, text before or after the list and a last element cut short are tolerated; elements that are no boxes
    are left out. All scores are 1.

    Returns:
        None where the text holds no list, or a list of which nothing is a box.
    """
    elements = _json_elements(text)
    if elements is None:
        return None
    found = [_detected(element, image_size, frame_size) for element in elements]
    objects = [item for item in found if item is not None]
    return None if elements and not objects else objects


def checked(text: str) -> str:
    """The text itself.

    Raises:
        ValueError: It holds one of the tokenizer's control tokens, which would break the conversation apart.
    """
    for token in CONTROL_TOKENS:
        if token in text:
            raise ValueError(f"the text {text[:80]!r} holds the control token {token}: remove it from the data")
    return text


def _turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}{END_OF_TURN}\n"


def _content(message: Message) -> str:
    """The text of one turn, its picture placeholders made Qwen's."""
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"a message has the role {role!r}: write system, user or assistant")
    if isinstance(content, str):
        parts = content.split(IMAGE_PLACEHOLDER) if role == "user" else [content]
        return IMAGE.join(checked(part) for part in parts)
    if not isinstance(content, Sequence):
        raise ValueError(f"the content of a {role} message is {type(content).__name__}: write text or a list of parts")
    return "".join(_part(part, role) for part in content)


def _part(part: Any, role: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return checked(part["text"])
    if kind == "image" and role == "user":
        return IMAGE
    raise ValueError(f"a {role} message holds the part {str(part)[:80]}: only text, and images of the user, are read")


def _to_frame(box: Box, image_size: tuple[int, int], frame_size: tuple[int, int]) -> list[int]:
    limits = zip(box, image_size * 2, frame_size * 2, strict=True)
    return [min(max(round(value * frame / size), 0), frame) for value, size, frame in limits]


def _json_elements(text: str) -> list[Any] | None:
    """The complete elements of the first JSON list in the text; None without a list or a complete element."""
    start = text.find("[")
    if start < 0:
        return None
    decoder, position, elements = json.JSONDecoder(), start + 1, []
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if text[position : position + 1] == "]":
            return elements
        try:
            element, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return elements or None
        elements.append(element)


def _detected(element: Any, image_size: tuple[int, int], frame_size: tuple[int, int]) -> DetectedObject | None:
    box = element.get("bbox_2d") if isinstance(element, dict) else None
    if not isinstance(box, list) or len(box) != 4:
        return None
    # Also refuses NaN, infinities and integers too large for a float.
    if not all(type(value) in (int, float) and abs(value) < 1e9 for value in box):
        return None
    limits = zip(box, image_size * 2, frame_size * 2, strict=True)
    x1, y1, x2, y2 = (min(max(value * size / frame, 0.0), float(size)) for value, size, frame in limits)
    if x2 < x1 or y2 < y1:
        return None
    label = element.get("label", "")
    return DetectedObject((x1, y1, x2, y2), 1.0, label if isinstance(label, str) else str(label))
