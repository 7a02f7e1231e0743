"""`recipe.metrics.gather`: in which order samples are, which ask for boxes, and how boxes are paired."""

from dataclasses import replace

import pytest
import torch
from metric_cases import make_sample

from recipe.boxes import asks_for_boxes, text_to_objects
from recipe.metrics.gather import (
    FALSE,
    IGNORED,
    found_truths,
    inside_crowd,
    match_by_overlap,
    match_by_score,
    sample_key,
)
from recipe.schema import DetectedObject, Object, Sample

A = (0.0, 0.0, 10.0, 10.0)
BOXES = '[{"bbox_2d": [0, 0, 10, 10], "label": "x"}]'


def test_samples_of_one_picture_with_other_messages_are_two():
    asked = make_sample("a", [(A, "x")], expression="the left one")
    other = make_sample("a", [(A, "x")], expression="the red one")
    keys = [sample_key(sample) for sample in (asked, other, make_sample("a", [(A, "x")]))]
    assert len(set(keys)) == 3
    assert sample_key(Sample.from_mds(asked.to_mds())) == keys[0]


@pytest.mark.parametrize("field", ["id", "image", "width", "height", "objects"])
def test_samples_that_differ_in_anything_have_another_place(field: str):
    """Two sets whose images have the same numbers and sizes: those without objects differ in the image alone."""
    sample = make_sample("a", [(A, "x")])
    value = {"id": "b", "image": b"another", "objects": ()}.get(field, 200)
    assert sample_key(replace(sample, **{field: value})) != sample_key(sample)


def test_an_overlap_of_exactly_the_threshold_is_enough():
    iou = torch.tensor([[0.5]]).double()
    assert match_by_score(iou, 0.5) == match_by_overlap(iou, 0.5) == [(0, 0)]
    assert match_by_score(iou, 0.51) == match_by_overlap(iou, 0.51) == []


def test_detections_take_the_best_free_truth_by_falling_score():
    """Each as COCO's loop does it, for random overlaps of which some are equal."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(200):
        rows, columns = torch.randint(0, 6, (2,), generator=generator).tolist()
        iou = torch.randint(0, 5, (rows, columns), generator=generator).double() / 4
        expected, free = list[tuple[int, int]](), set(range(columns))
        for row in range(rows):
            best = max(sorted(free), key=lambda column: float(iou[row, column]), default=None)
            if best is not None and iou[row, best] >= 0.5:
                expected.append((row, best))
                free.remove(best)
        assert match_by_score(iou, 0.5) == expected


def test_pairs_have_the_largest_total_overlap():
    """.9 alone is more than .3 and .4 together, though these are two pairs."""
    iou = torch.tensor([[0.9, 0.3], [0.4, 0.0]]).double()
    assert match_by_overlap(iou, 0.0) == [(0, 0)]
    assert match_by_overlap(iou - torch.tensor([[0.3, 0.0], [0.0, 0.0]]), 0.0) == [(0, 1), (1, 0)]


def test_half_a_box_in_a_crowd_is_in_it():
    crowd = torch.tensor([[5.0, 0.0, 50.0, 50.0]]).double()
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 9.0, 10.0]]).double()
    assert inside_crowd(boxes, crowd, 0.5).tolist() == [True, False]


def _box(x: float) -> tuple[float, float, float, float]:
    return (x, 0.0, x + 10, 10.0)


def _found(*places: float) -> list[DetectedObject]:
    """Boxes of 10 x 10 pixels, by falling score."""
    return [DetectedObject(_box(x), 0.9 - 0.1 * index, "cat") for index, x in enumerate(places)]


def test_what_detections_find_by_hand():
    truth = [Object(_box(0), "cat"), Object(_box(20), "cat"), Object(_box(40), "", iscrowd=True)]
    # IoU 9/11 with the first; the first again, taken; 4/16 with the second; 7/13 with it; in the crowd; nowhere.
    found = _found(1, 0, 26, 23, 41, 80)
    assert found_truths(found, truth, 0.5) == [0, FALSE, FALSE, 1, IGNORED, FALSE]
    assert found_truths(found, truth[::-1], 0.5) == [2, FALSE, FALSE, 1, IGNORED, FALSE]
    assert found_truths([], truth, 0.5) == []
    assert found_truths(found[:1], [], 0.5) == [FALSE]


def test_a_lower_score_takes_no_truth_from_a_higher_one():
    """So the gallery can filter matches by score: those of a prefix are a prefix of those of all."""
    truth = [Object(_box(x), "cat") for x in (0, 6, 12)]
    found = _found(5, 0, 3, 9, 12, 1)
    whole = found_truths(found, truth, 0.5)
    for length in range(len(found)):
        assert found_truths(found[:length], truth, 0.5) == whole[:length]


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
