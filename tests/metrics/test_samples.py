"""`recipe.metrics.samples`: which samples are one, and which ask for boxes."""

from dataclasses import replace

import pytest
from metric_cases import make_sample

from recipe.data.chat import text_to_objects
from recipe.metrics.samples import asks_for_boxes, sample_key
from recipe.schema import Sample

A = (0.0, 0.0, 10.0, 10.0)
BOXES = '[{"bbox_2d": [0, 0, 10, 10], "label": "x"}]'


def test_samples_of_one_picture_with_other_messages_are_two():
    asked = make_sample("a", [(A, "x")], expression="the left one")
    other = make_sample("a", [(A, "x")], expression="the red one")
    keys = [sample_key(sample) for sample in (asked, other, make_sample("a", [(A, "x")]))]
    assert len(set(keys)) == 3
    assert sample_key(Sample.from_mds(asked.to_mds())) == keys[0]


@pytest.mark.parametrize("field", ["id", "width", "height", "objects"])
def test_samples_that_differ_in_anything_scored_are_two(field: str):
    sample = make_sample("a", [(A, "x")])
    value = {"id": "b", "objects": ()}.get(field, 200)
    assert sample_key(replace(sample, **{field: value})) != sample_key(sample)
    assert sample_key(replace(sample, image=b"dropped")) == sample_key(sample)


@pytest.mark.parametrize(
    "answer",
    [
        BOXES, f"Here:\n```json\n{BOXES}\n```", "[]", "[ ]", '[{"label": "[]", "bbox_2d" : [0, 0, 10, 10]}]',
        "Brown.", "", "See [1].", "[1, 2, 3]", '[{"label": "x"}]', "It is at (0, 0), on the left [of the dog].",
    ],
)  # fmt: skip
def test_an_answer_that_reads_as_boxes_asks_for_them(answer: str):
    sample = make_sample("a", [(A, "x")], expression="it", answers=[answer])
    assert asks_for_boxes(sample) is (text_to_objects(answer, (100, 100), (100, 100)) is not None)


def test_without_an_answer_boxes_are_asked_for():
    assert asks_for_boxes(make_sample("a", []))
    assert asks_for_boxes(make_sample("a", [], expression="the left one"))


def test_the_first_answer_is_the_one_that_is_generated():
    assert asks_for_boxes(make_sample("a", [], expression="it", answers=[BOXES, "Brown."]))
    assert not asks_for_boxes(make_sample("a", [], expression="it", answers=["Brown.", BOXES]))


@pytest.mark.parametrize(("text", "expected"), [(BOXES, True), ("Brown.", False)])
def test_an_answer_in_parts(text: str, expected: bool):
    parts = [{"type": "text", "text": text[:5]}, {"type": "text", "text": text[5:]}]
    messages = ({"role": "user", "content": "it"}, {"role": "assistant", "content": parts})
    assert asks_for_boxes(Sample("a", b"", 100, 100, (), messages)) is expected
