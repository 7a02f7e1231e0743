"""`recipe.metrics.boxes`."""

import pytest
from metric_cases import make_prediction, make_sample

from recipe.metrics.boxes import expression_accuracy, query_recall

A, B, C = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (40.0, 0.0, 50.0, 10.0)


def test_query_recall_worked_by_hand():
    # image a: two queries for three truths, one of them found at a score near 0; image b: both found
    predictions = [
        make_prediction("a", [(A, 0.001, ""), ((70.0, 70.0, 80.0, 80.0), 0.9, "")]),
        make_prediction("b", [(B, 0.9, ""), (A, 0.1, "")]),
    ]
    samples = [make_sample("a", [(A, "x"), (B, "x"), (C, "x")]), make_sample("b", [(A, "x"), (B, "x")], crowds=[C])]
    assert query_recall(predictions, samples, 2) == pytest.approx(
        {"recall_ceiling": (2 + 2) / 5, "query_recall50": (1 + 2) / 5}
    )


def test_the_ceiling_counts_queries_that_nms_removed():
    left = make_prediction("a", [(A, 0.9, "")])  # of three queries
    sample = make_sample("a", [(A, "x"), (B, "x"), (C, "x"), ((70.0, 70.0, 80.0, 80.0), "x")])
    assert query_recall([left], [sample], 3) == {"recall_ceiling": 0.75, "query_recall50": 0.25}


def test_queries_are_dealt_for_the_most_truths():
    # the first query reaches both truths, the second one only the first
    truths = [((0.0, 0.0, 10.0, 10.0), "x"), ((3.0, 0.0, 13.0, 10.0), "x")]
    found = [((1.0, 0.0, 11.0, 10.0), 0.9, ""), ((-3.0, 0.0, 7.0, 10.0), 0.1, "")]
    assert query_recall([make_prediction("a", found)], [make_sample("a", truths)], 2)["query_recall50"] == 1.0
    twice = [make_prediction("a", [(A, 0.9, ""), (A, 0.8, "")])]
    assert query_recall(twice, [make_sample("a", [(A, "x")])], 2)["query_recall50"] == 1.0


def test_query_recall_of_nothing():
    undefined = {"recall_ceiling": -1.0, "query_recall50": -1.0}
    assert query_recall([], [], 2) == undefined
    found = [(A, 0.9, "")]
    assert query_recall([make_prediction("a", found)], [make_sample("a", [])], 2) == undefined
    assert query_recall([make_prediction("a", found)], [make_sample("a", None)], 2) == undefined
    missed = query_recall([make_prediction("a", [])], [make_sample("a", [(A, "x")])], 2)
    assert missed == {"recall_ceiling": 1.0, "query_recall50": 0.0}


def test_the_best_scored_box_answers_an_expression():
    samples = [make_sample(name, [(A, "x")], expression="the left one") for name in "abcde"]
    predictions = [
        make_prediction("a", [(B, 0.2, ""), (A, 0.9, "")]),
        make_prediction("b", [(B, 0.9, ""), (A, 0.2, "")]),
        make_prediction("c", [((5.0, 0.0, 15.0, 10.0), 0.9, "")]),
        make_prediction("d", []),
        make_prediction("e", [(C, 0.1, ""), (B, 0.2, ""), (A, 0.3, "")]),
    ]
    assert expression_accuracy(predictions, samples) == pytest.approx({"refcoco_acc": 2 / 5, "refcoco_samples": 5.0})


def test_half_an_overlap_is_right():
    found = [make_prediction("a", [((0.0, 0.0, 10.0, 5.0), 0.9, "")])]
    sample = make_sample("a", [(A, "x")], expression="it")
    assert expression_accuracy(found, [sample])["refcoco_acc"] == 1.0


def test_what_is_no_expression():
    found = [(A, 0.9, "")]
    samples = [
        make_sample("a", [(A, "x")]),
        make_sample("b", [(A, "x"), (B, "x")], expression="both"),
        make_sample("c", [], expression="none"),
        make_sample("d", None, expression="unknown"),
        make_sample("e", [(A, "x")], crowds=[B], expression="one, beside a crowd"),
    ]
    predictions = [make_prediction(name, found) for name in "abcde"]
    assert expression_accuracy(predictions, samples) == {"refcoco_acc": 1.0, "refcoco_samples": 1.0}
    assert expression_accuracy([], []) == {"refcoco_acc": -1.0, "refcoco_samples": 0.0}


@pytest.mark.parametrize(
    ("answers", "counted"),
    [([], 1), (['[{"bbox_2d": [0, 0, 10, 10], "label": "x"}]'], 1), (["Brown."], 0), (["[]", "Brown."], 1)],
)
def test_an_expression_asks_for_boxes(answers: list[str], counted: int):
    sample = make_sample("a", [(A, "x")], expression="the left one", answers=answers)
    found = make_prediction("a", [(A, 0.9, "")])
    assert expression_accuracy([found], [sample])["refcoco_samples"] == counted


def test_two_expressions_of_one_object_are_two_samples():
    samples = [make_sample("a", [(A, "x")], expression=text) for text in ("the left one", "the red one")]
    found = [make_prediction("a", [(box, 0.9, "")]) for box in (A, B)]
    assert expression_accuracy(found, samples) == {"refcoco_acc": 0.5, "refcoco_samples": 2.0}


def test_a_query_that_overlaps_half_a_truth_finds_it():
    half = (0.0, 0.0, 5.0, 10.0)
    assert query_recall([make_prediction("a", [(half, 0.1, "")])], [make_sample("a", [(A, "x")])], 1) == {
        "recall_ceiling": 1.0,
        "query_recall50": 1.0,
    }
