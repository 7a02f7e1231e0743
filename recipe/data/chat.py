"""The text of a conversation.

A conversation is ChatML as Qwen's own template renders it. Its segments are tokenised one by one, so the prompt has the
same ids in training and at inference, and the answers are known spans.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipe.config import PromptConfig
from recipe.schema import Box, Message, Role

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
IMAGE_PLACEHOLDER = "<image>"
GENERATION_PROMPT = "<|im_start|>assistant\n"
END_OF_TURN = "<|im_end|>"
CONTROL_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation. A role other than NONE makes all its tokens supervised."""

    text: str
    role: Role = Role.NONE


def system_segments(system: str) -> list[Segment]:
    """Return the system turn; nothing if `system` is empty."""
    return [Segment(_turn("system", checked(system)))] if system else []


def detection_question(prompt: PromptConfig) -> str:
    """Return the user turn of a detection chat and the generation prompt."""
    candidates = f" Candidates: {', '.join(prompt.candidate_phrases)}." if prompt.candidate_phrases else ""
    return _turn("user", IMAGE + checked(prompt.detect + candidates)) + GENERATION_PROMPT


def answer_segments(text: str, role: Role) -> list[Segment]:
    """Return an answer, supervised up to its end-of-turn token; the line break after it is not."""
    return [Segment(checked(text) + END_OF_TURN, role), Segment("\n")]


def write_boxes(messages: Sequence[Message], write: Callable[[Box, int], str]) -> list[Message]:
    """Return the messages with the text that `write` makes of each box part and the number of its image, from 0.

    The form of a box is the run's.
    """
    written: list[Message] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            texts = [write(part["box"], part.get("image", 0)) if _is_box(part) else part for part in content]
            content = [{"type": "text", "text": item} if isinstance(item, str) else item for item in texts]
        written.append({**message, "content": content})
    return written


def box_parts(messages: Sequence[Message]) -> list[Box]:
    """Return the boxes of all box parts, in order."""
    return [tuple(part["box"]) for message in messages for part in _parts(message) if _is_box(part)]


def with_box_parts(messages: Sequence[Message], boxes: Iterable[Box]) -> list[Message]:
    """Return the messages with other boxes in their box parts."""
    others = iter(boxes)
    return [
        {
            **message,
            "content": [{**part, "box": list(next(others))} if _is_box(part) else part for part in _parts(message)],
        }
        if any(map(_is_box, _parts(message)))
        else message
        for message in messages
    ]


def texts_of(messages: Sequence[Message]) -> list[str]:
    """Return the texts of all messages."""
    contents = [message.get("content") for message in messages]
    texts = [content for content in contents if isinstance(content, str)]
    parts = [part for message in messages for part in _parts(message)]
    return texts + [part["text"] for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]


def _parts(message: Message) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else ()


def message_segments(messages: Sequence[Message], num_images: int) -> list[Segment]:
    """Return a sample's own chat without its system turn; all assistant turns are supervised as the student's.

    The images replace `<image>` or `{"type": "image"}` in user turns, in order; if there is no such place, they open
    the first user turn. A chat that ends with a user turn gets a generation prompt.

    Raises:
        ValueError: A turn is malformed, or the number of placeholders is wrong.
    """
    turns = [(message.get("role"), _content(message)) for message in messages]
    if turns and turns[0][0] == "system":
        del turns[0]
    if any(role == "system" for role, _ in turns):
        raise ValueError("`messages` has a system turn that is not the first: move it to the front")
    questions = [position for position, (role, _) in enumerate(turns) if role == "user"]
    if not questions:
        raise ValueError("`messages` has no user turn: add one, or write null for the detection chat")
    found = sum(turns[position][1].count(IMAGE) for position in questions)
    if found == 0:
        turns[questions[0]] = ("user", IMAGE * num_images + turns[questions[0]][1])
    elif found != num_images:
        raise ValueError(
            f"`messages` has {found} image placeholders, but the sample holds {num_images} images: make them equal"
        )
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
    """Return the system text of a chat, or `default` if it has none."""
    return _content(messages[0]) if messages and messages[0].get("role") == "system" else default


def checked(text: str) -> str:
    """Return the text; raise ValueError if it holds a control token, which would break the conversation apart."""
    for token in CONTROL_TOKENS:
        if token in text:
            raise ValueError(f"the text {text[:80]!r} holds the control token {token}: remove it from the data")
    return text


def _turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}{END_OF_TURN}\n"


def _content(message: Message) -> str:
    """Return the text of one turn, its image placeholders replaced by Qwen's."""
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"a message has the role {role!r}: write system, user or assistant")
    if isinstance(content, str):
        parts = content.split(IMAGE_PLACEHOLDER) if role == "user" else [content]
        return IMAGE.join(checked(part) for part in parts)
    if not isinstance(content, Sequence):
        raise ValueError(f"the content of a {role} message is {type(content).__name__}: write text or a list of parts")
    return "".join(_part(part, role) for part in content)


def _is_box(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "box"


def _part(part: Any, role: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return checked(part["text"])
    if kind == "image" and role == "user":
        return IMAGE
    raise ValueError(f"a {role} message holds the part {str(part)[:80]}: only text is read, and images of the user")
