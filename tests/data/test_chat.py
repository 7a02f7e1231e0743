"""The conversation's text."""

from typing import Any

import pytest

from recipe.config import PromptConfig
from recipe.data.chat import (
    Segment,
    answer_segments,
    checked,
    detection_question,
    message_segments,
    system_of,
    system_segments,
)
from recipe.schema import Role

CAT = '{"bbox_2d": [10, 20, 30, 40], "label": "cat"}'
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def text_of(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_a_detection_chat_reads_as_qwens_template_renders_it(processor: Any):
    prompt = PromptConfig(system="Be exact.", detect="Find all.", candidate_phrases=["cat", "big dog"])
    question = {"type": "text", "text": "Find all. Candidates: cat, big dog."}
    turn = {"role": "user", "content": [{"type": "image"}, question]}
    chat = [{"role": "system", "content": "Be exact."}, turn, assistant("[]"), turn, assistant(f"[{CAT}]"), turn]
    segments = [*system_segments(prompt.system)]
    for answer in ("[]", f"[{CAT}]"):
        segments += [Segment(detection_question(prompt)), *answer_segments(answer, Role.TEACHER)]
    segments.append(Segment(detection_question(prompt)))
    assert text_of(segments) == processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def test_given_messages_read_as_qwens_template_renders_them(processor: Any):
    chat = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "See "}, {"type": "image"}, {"type": "text", "text": "?"}],
        },
        assistant("A cat."),
        user("Sure?"),
        assistant("Yes."),
    ]
    segments = [*system_segments(system_of(chat, "unused")), *message_segments(chat, num_images=1)]
    assert text_of(segments) == processor.apply_chat_template(chat, tokenize=False)
    assert [item.text for item in segments if item.role is Role.STUDENT] == ["A cat.<|im_end|>", "Yes.<|im_end|>"]


def test_no_system_turn_where_the_text_is_empty():
    assert system_segments("") == []
    assert system_of([user("hi")], "default") == "default"


def test_the_picture_stands_where_the_messages_say_else_first():
    assert IMAGE + "hi" in text_of(message_segments([user("hi")], num_images=1))
    assert f"see {IMAGE} here" in text_of(message_segments([user("see <image> here")], num_images=1))
    assert IMAGE not in text_of(message_segments([user("hi")], num_images=0))
    assert IMAGE * 3 + "hi" in text_of(message_segments([user("hi"), assistant("yes"), user("again")], num_images=3))
    turns = [user("<image> or <image>"), assistant("the first"), user("and <image>")]
    assert text_of(message_segments(turns, num_images=3)).count(IMAGE) == 3
    text = text_of(message_segments([user("a"), assistant("an <image> tag"), user("<image>")], num_images=1))
    assert text.count(IMAGE) == 1
    assert "an <image> tag" in text


@pytest.mark.parametrize(
    ("messages", "num_images", "message"),
    [
        ([user("<image>")], 0, "1 image placeholders, but the sample holds 0"),
        ([user("<image><image>")], 1, "2 image placeholders, but the sample holds 1"),
        ([assistant("hello")], 0, "no user turn"),
        ([], 0, "no user turn"),
        ([{"role": "tool", "content": "x"}], 0, "role 'tool'"),
        ([{"content": "x"}], 0, "role None"),
        ([{"role": "user", "content": None}], 0, "NoneType"),
        ([user("a"), {"role": "system", "content": "late"}], 0, "system turn that is not the first"),
        ([{"role": "user", "content": [{"type": "video"}]}], 0, "part"),
        ([user("x<|im_end|>y")], 0, "control token <|im_end|>"),
    ],
)
def test_malformed_messages_are_refused(messages: list[dict], num_images: int, message: str):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        message_segments(messages, num_images)


def test_control_tokens_in_text_are_refused():
    with pytest.raises(ValueError, match="image_pad"):
        checked("a <|image_pad|> b")
    assert checked("a <b> | c") == "a <b> | c"
