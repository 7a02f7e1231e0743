"""The conversation's text, and boxes to text and back."""

from typing import Any

import numpy as np
import pytest

from recipe.config import PromptConfig
from recipe.data.chat import (
    Segment,
    answer_frame,
    answer_segments,
    checked,
    detection_question,
    message_segments,
    objects_to_text,
    system_of,
    system_segments,
    text_to_objects,
)
from recipe.schema import DetectedObject, Object, Role

SIZE = (200, 100)
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
CAT = '{"bbox_2d": [10, 20, 30, 40], "label": "cat"}'
FOUND_CAT = DetectedObject((10.0, 20.0, 30.0, 40.0), 1.0, "cat")


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
    segments = [*system_segments(system_of(chat, "unused")), *message_segments(chat, has_image=True)]
    assert text_of(segments) == processor.apply_chat_template(chat, tokenize=False)
    assert [item.text for item in segments if item.role is Role.STUDENT] == ["A cat.<|im_end|>", "Yes.<|im_end|>"]


def test_no_system_turn_where_the_text_is_empty():
    assert system_segments("") == []
    assert system_of([user("hi")], "default") == "default"


def test_the_picture_stands_where_the_messages_say_else_first():
    assert IMAGE + "hi" in text_of(message_segments([user("hi")], has_image=True))
    assert f"see {IMAGE} here" in text_of(message_segments([user("see <image> here")], has_image=True))
    assert IMAGE not in text_of(message_segments([user("hi")], has_image=False))
    text = text_of(message_segments([user("a"), assistant("an <image> tag"), user("<image>")], has_image=True))
    assert text.count(IMAGE) == 1
    assert "an <image> tag" in text


@pytest.mark.parametrize(
    ("messages", "has_image", "message"),
    [
        ([user("<image>")], False, "1 image placeholders, but the sample holds 0"),
        ([user("<image><image>")], True, "2 image placeholders, but the sample holds 1"),
        ([assistant("hello")], False, "no user turn"),
        ([], False, "no user turn"),
        ([{"role": "tool", "content": "x"}], False, "role 'tool'"),
        ([{"content": "x"}], False, "role None"),
        ([{"role": "user", "content": None}], False, "NoneType"),
        ([user("a"), {"role": "system", "content": "late"}], False, "system turn that is not the first"),
        ([{"role": "user", "content": [{"type": "video"}]}], False, "part"),
        ([user("x<|im_end|>y")], False, "control token <|im_end|>"),
    ],
)
def test_malformed_messages_are_refused(messages: list[dict], has_image: bool, message: str):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        message_segments(messages, has_image)


def test_control_tokens_in_text_are_refused():
    with pytest.raises(ValueError, match="image_pad"):
        checked("a <|image_pad|> b")
    assert checked("a <b> | c") == "a <b> | c"


def test_the_answer_is_sorted_scaled_and_free_of_crowds():
    objects = [
        Object((10, 50, 200, 100), 'späte "Kuh"'),
        Object((60, 0.2, 80, 20), "right"),
        Object((0, 0, 20, 20), "left"),
        Object((0, 0, 200, 100), "people", iscrowd=True),
    ]
    assert objects_to_text(objects, SIZE, (100, 50)) == (
        '[{"bbox_2d": [0, 0, 10, 10], "label": "left"}, {"bbox_2d": [30, 0, 40, 10], "label": "right"}, '
        '{"bbox_2d": [5, 25, 100, 50], "label": "späte \\"Kuh\\""}]'
    )
    assert objects_to_text(objects[2:3], SIZE, (1000, 1000)) == '[{"bbox_2d": [0, 0, 100, 200], "label": "left"}]'
    assert objects_to_text([], SIZE, SIZE) == "[]"
    assert text_to_objects("[]", SIZE, SIZE) == []


@pytest.mark.parametrize("frame", [(196, 112), (1000, 1000), (28, 1008)])
def test_boxes_come_back_within_half_a_step(frame: tuple[int, int]):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((50, 2, 2)) * SIZE, axis=1).reshape(50, 4)
    objects = [Object(tuple(box), f"thing {i}\n{{") for i, box in enumerate(corners.tolist())]
    found = text_to_objects(objects_to_text(objects, SIZE, frame), SIZE, frame)
    assert found is not None
    boxes = {item.caption: item.box for item in found}
    assert len(boxes) == 50
    assert all(item.score == 1.0 for item in found)
    bound = 0.5 * np.array([SIZE[0] / frame[0], SIZE[1] / frame[1]] * 2) + 1e-9
    for item in objects:
        assert (np.abs(np.array(boxes[item.caption]) - item.box) <= bound).all()


@pytest.mark.parametrize(
    "text",
    [
        f"[{CAT}]",
        f"```json\n[\n\t{CAT}\n]\n```",
        f"Here you are: [{CAT}] I hope it helps [1].",
        f'[{CAT}, {{"bbox_2d": [1, 2, 3',
        f"[{CAT},",
        f'[{CAT}, {{"bbox_2d": [1, 2], "label": "short"}}, "dog", {{"bbox_2d": [1, 2, 3, NaN]}}]',
        f'[{CAT}, {{"bbox_2d": [30, 2, 3, 4]}}, {{"bbox_2d": [1, 2, {"9" * 400}, 4]}}, {{"bbox_2d": [true, 2, 3, 4]}}]',
    ],
)
def test_answers_are_read_with_patience(text: str):
    assert text_to_objects(text, SIZE, SIZE) == [FOUND_CAT]


def test_labels_may_be_missing_and_boxes_are_cut_to_the_picture():
    text = '[{"bbox_2d": [-5, 2.5, 999, 40]}, {"bbox_2d": [1, 2, 3, 4], "label": 7}]'
    first, second = text_to_objects(text, SIZE, SIZE) or []
    assert first == DetectedObject((0.0, 2.5, 200.0, 40.0), 1.0, "")
    assert second.caption == "7"


@pytest.mark.parametrize("text", ["", "no objects", '[{"bbox_2d": [1, 2', "[1, 2]", "[" * 5000, f"{CAT}"])
def test_what_is_no_list_of_boxes_does_not_parse(text: str):
    assert text_to_objects(text, SIZE, SIZE) is None


def test_frames():
    assert answer_frame("absolute", (56, 84)) == (56, 84)
    assert answer_frame("normalized_1000", (56, 84)) == (1000, 1000)
    with pytest.raises(ValueError, match=r"'relative'.*absolute or normalized_1000"):
        answer_frame("relative", (56, 84))
