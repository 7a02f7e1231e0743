"""`recipe.metrics.captions`."""

from collections.abc import Sequence

import pytest
from metric_cases import make_prediction, make_sample

from recipe.metrics.captions import caption_match
from recipe.schema import Box, Prediction, Sample


class Letters:
    """A text scorer for tests: 1 for equal captions, 0.5 for the same first letter, else 0."""

    name = "letters"

    def __call__(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        pairs = zip(candidates, references, strict=True)
        return [max(max(float(text == own), 0.5 * (text[:1] == own[:1])) for own in texts) for text, texts in pairs]


A, B, C = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (40.0, 0.0, 50.0, 10.0)


def scores(predictions: list[Prediction], samples: list[Sample]) -> dict[str, float]:
    """All but CIDEr-D, which has its own file."""
    found = caption_match(predictions, samples, 0.3, Letters())
    return {name: value for name, value in found.items() if name != "caption_cider_d"}


def test_worked_by_hand():
    # A right, B found with a wrong caption, C only below the threshold; over two images
    found = [(A, 0.9, "red Cat "), (B, 0.8, "dog"), (C, 0.29, "bird")]
    truths = [(A, "red cat"), (B, "wolf"), (C, "bird")]
    result = scores(
        [make_prediction("a", found), make_prediction("b", [(A, 0.3, "cUP")])],
        [make_sample("a", truths), make_sample("b", [(A, "Cup")])],
    )
    assert result == pytest.approx(
        {"caption_match": 2 / 3, "caption_letters": 0.5 / 3, "matched_boxes": 3.0, "recall": 3 / 4}
    )


def shifted(x: float) -> Box:
    return x, 0.0, x + 10.0, 10.0


def test_each_truth_is_matched_once_and_the_better_score_chooses_first():
    found = [(A, 0.5, "exact but later"), (shifted(2.0), 0.9, "first")]
    assert scores([make_prediction("a", found)], [make_sample("a", [(A, "first")])]) == {
        "caption_match": 1.0,
        "caption_letters": 1.0,
        "matched_boxes": 1.0,
        "recall": 1.0,
    }


def test_a_detection_takes_the_truth_it_overlaps_most():
    # shifted(1) overlaps both at IoU >= .5; it must take the second, at IoU 9/11
    found = [(shifted(1.0), 0.9, "near")]
    truths = [(shifted(4.0), "far"), (A, "near")]
    assert scores([make_prediction("a", found)], [make_sample("a", truths)])["caption_match"] == 1.0


def test_overlap_below_one_half_is_no_match():
    assert scores([make_prediction("a", [(shifted(4.0), 0.9, "x")])], [make_sample("a", [(A, "x")])]) == {
        "caption_match": 0.0,
        "caption_letters": 0.0,
        "matched_boxes": 0.0,
        "recall": 0.0,
    }


def test_crowds_empty_images_and_unannotated_samples():
    found = [(A, 0.9, "x")]
    names = ["a", "b", "c", "d"]
    samples = [
        make_sample("a", [], crowds=[A]),
        make_sample("b", []),
        make_sample("c", None),
        Sample("d", b"", 0, 0, ()),
    ]
    assert scores([make_prediction(name, found) for name in names], samples) == {
        "caption_match": -1.0,
        "caption_letters": -1.0,
        "matched_boxes": 0.0,
        "recall": -1.0,
    }


def test_boxes_without_area_match_nothing_and_hide_nothing():
    point = (5.0, 5.0, 5.0, 5.0)
    result = scores(
        [make_prediction("a", [(point, 0.9, "x"), (A, 0.8, "y")])], [make_sample("a", [(point, "x"), (A, "y")])]
    )
    assert result == {"caption_match": 1.0, "caption_letters": 1.0, "matched_boxes": 1.0, "recall": 0.5}
