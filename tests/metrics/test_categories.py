"""Scores by category."""

import json
from dataclasses import replace

import pytest
from metric_cases import make_prediction, make_sample

from recipe.metrics.boxes import CategoryScores, category_average_precision, scores_per_category
from recipe.metrics.categories import category_table, report_categories
from recipe.schema import DetectedObject, Object, Prediction

LEFT, RIGHT = (0.0, 0.0, 10.0, 10.0), (50.0, 0.0, 60.0, 10.0)
FAR, NEAR = (80.0, 80.0, 90.0, 90.0), (0.0, 50.0, 9.0, 60.0)
# a: a cat taken for a dog, a dog found, a dog missed, a cat seen in nothing; b: a cat found.
PREDICTIONS = [
    make_prediction("a", [(LEFT, 0.9, "dog"), (RIGHT, 0.8, "Dog"), (NEAR, 0.7, "cat"), (FAR, 0.1, "dog")]),
    make_prediction("b", [(LEFT, 0.6, "cat")]),
]
SAMPLES = [make_sample("a", [(LEFT, "cat"), (RIGHT, "dog"), (FAR, "dog ")]), make_sample("b", [(LEFT, "Cat")])]


def test_scores_by_hand() -> None:
    """Dogs: wrong, right, right: precisions 1/2, 2/3, so 2/3 up to recall 1. Cats: wrong, right, 1 of 2: 1/2."""
    found = scores_per_category(PREDICTIONS, SAMPLES)
    assert list(found) == ["cat", "dog"]
    assert found["dog"].truths == found["cat"].truths == 2
    assert (found["dog"].ap50, found["dog"].recall) == (pytest.approx(2 / 3), 1.0)
    assert (found["cat"].ap50, found["cat"].recall) == (pytest.approx(51 / 101 / 2), 0.5)


def test_their_mean_is_the_category_ap() -> None:
    found, all_of_them = scores_per_category(PREDICTIONS, SAMPLES), category_average_precision(PREDICTIONS, SAMPLES)
    for name in ("ap", "ap50"):
        mean = sum(getattr(scores, name) for scores in found.values()) / len(found)
        assert mean == pytest.approx(all_of_them[f"category_{name}"], abs=1e-6)


def test_a_category_without_truths_is_left_out() -> None:
    found = scores_per_category([make_prediction("b", [(LEFT, 0.6, "bird")])], [make_sample("b", [(LEFT, "cat")])])
    assert found == {"cat": CategoryScores(1, 0.0, 0.0, 0.0)}
    assert scores_per_category([], []) == {}


def test_every_class_of_an_object_counts_with_its_probability() -> None:
    """The cat that is 0.6 dog is a cat of 0.4 * 0.9 too, which the wrong cat of 0.7 does not outrank if it is less."""
    unsure = DetectedObject(LEFT, 0.9, "dog", (("dog", 0.6), ("cat", 0.4)))
    predictions = [Prediction("a", 100, 100, (unsure,))]
    samples = [make_sample("a", [(LEFT, "cat")])]
    assert scores_per_category(predictions, samples)["cat"] == CategoryScores(1, 1.0, 1.0, 1.0)
    assert category_average_precision(predictions, samples)["category_ap"] == 1.0
    assert unsure.per_class() == [DetectedObject(LEFT, 0.54, "dog"), DetectedObject(LEFT, 0.36000000000000004, "cat")]
    wrong = DetectedObject(FAR, 0.5, "cat", (("cat", 1.0),))
    (found,) = scores_per_category([Prediction("a", 100, 100, (unsure, wrong))], samples).values()
    assert found.ap50 == pytest.approx(0.5)


def test_confusion_and_worst_images_by_hand() -> None:
    report = report_categories(PREDICTIONS, SAMPLES, score_threshold=0.3)
    assert report.confusion == {
        ("cat", "dog"): 1,
        ("dog", "dog"): 1,
        ("", "cat"): 1,
        ("dog", ""): 1,  # found at a score below the threshold
        ("cat", "cat"): 1,
    }
    assert report.worst == {"cat": [("a", 2)], "dog": [("a", 2)]}
    assert json.loads(json.dumps(report.to_json()))["scores"]["dog"]["truths"] == 2


def test_open_captions_do_not_fill_the_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three pairs and two categories one is kept, and what is left out is counted: two boxes, one category."""
    samples = [make_sample("a", [(LEFT, "cat"), (RIGHT, "dog")]), make_sample("b", [(LEFT, "cat")])]
    predictions = [make_prediction("a", [(LEFT, 0.9, "cat"), (RIGHT, 0.9, "fox")]), make_prediction("b", [])]
    monkeypatch.setattr("recipe.metrics.categories.KEPT", 1)
    found = report_categories(predictions, samples, 0.3).to_json()
    assert list(found["scores"]) == list(found["worst"]) == ["cat"] and found["scores_left_out"] == 1
    assert found["confusion"] == [["cat", "cat", 1]] and found["confusion_left_out"] == 2
    monkeypatch.setattr("recipe.metrics.categories.KEPT", 3)
    whole = report_categories(predictions, samples, 0.3).to_json()
    assert len(whole["confusion"]) == 3 and whole["confusion_left_out"] == whole["scores_left_out"] == 0


def test_crowd_regions_are_ignored() -> None:
    sample = make_sample("a", [(LEFT, "cat")], crowds=[FAR])
    report = report_categories([make_prediction("a", [(FAR, 0.9, "cat"), (LEFT, 0.8, "cat")])], [sample], 0.0)
    assert report.confusion == {("cat", "cat"): 1} and report.worst == {}


def test_a_table_for_the_console() -> None:
    lines = category_table(report_categories(PREDICTIONS, SAMPLES, 0.3)).splitlines()
    assert lines[0].split() == ["category", "truths", "AP", "AP50", "recall", "worst", "image", "(errors)"]
    assert lines[1].split() == ["cat", "2", "0.252", "0.252", "0.500", "a", "(2)"]
    assert lines[-1] == "  taken for another: cat for dog (1)"
    many = [replace(SAMPLES[0], objects=tuple(Object(LEFT, f"thing {index}") for index in range(40)))]
    lines = category_table(report_categories([PREDICTIONS[0]], many, 0.3)).splitlines()
    assert "  and 10 categories with fewer truths: see eval.json" in lines
    assert category_table(report_categories([], [], 0.3)).splitlines() == [
        "  category  truths     AP   AP50  recall  worst image (errors)"
    ]


def test_an_object_with_classes_keeps_them() -> None:
    item = DetectedObject(LEFT, 0.9, "dog", (("dog", 0.6), ("cat", 0.4)))
    assert DetectedObject.from_json(json.loads(json.dumps(item.to_json()))) == item
    assert "classes" not in DetectedObject(LEFT, 0.9, "dog").to_json()
