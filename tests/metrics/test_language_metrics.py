"""`recipe.metrics.boxes.answer_boxes`."""

import pytest
from metric_cases import make_prediction, make_sample

from recipe.metrics.boxes import answer_boxes as scores
from recipe.schema import Box, Prediction, Sample

A, B, C = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (40.0, 0.0, 50.0, 10.0)


def answered(name: str, boxes: list[Box]) -> Prediction:
    return make_prediction(name, [], boxes)


def unparsed(name: str) -> Prediction:
    return Prediction(name, 100, 100, (), "no json", None)


def test_worked_by_hand():
    # image a: A exactly, B at IoU 8/10, C missed, one false box; image b: not parsed, one truth
    result = scores(
        [answered("a", [A, (20.0, 0.0, 28.0, 10.0), (70.0, 70.0, 80.0, 80.0)]), unparsed("b")],
        [make_sample("a", [(A, "x"), (B, "x"), (C, "x")]), make_sample("b", [(A, "x")])],
    )
    assert result == pytest.approx(
        {
            "text_f1": 2 * 2 / (3 + 4),
            "text_f1_95": 2 * 1 / (3 + 4),
            "text_miou": (1 + 0.8) / 4,
            "text_parse_failure_rate": 0.5,
            "text_answers": 2,
        }
    )


def test_overlap_below_one_half_is_no_hit_but_counts_in_the_mean():
    result = scores([answered("a", [(5.0, 0.0, 15.0, 10.0)])], [make_sample("a", [(A, "x")])])
    assert result == pytest.approx(
        {"text_f1": 0.0, "text_f1_95": 0.0, "text_miou": 1 / 3, "text_parse_failure_rate": 0.0, "text_answers": 1}
    )


def test_pairs_are_one_to_one_and_best_in_sum():
    # the first box overlaps both truths; giving it the truth it overlaps most leaves nothing for the second box
    truths = [((0.0, 0.0, 10.0, 10.0), "x"), ((3.0, 0.0, 13.0, 10.0), "x")]
    boxes = [(1.0, 0.0, 11.0, 10.0), (-3.0, 0.0, 7.0, 10.0)]
    assert scores([answered("a", boxes)], [make_sample("a", truths)])["text_f1"] == 1.0
    assert scores([answered("a", [A, A])], [make_sample("a", [(A, "x")])])["text_f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("width", "expected"), [(9.2, 0.0), (9.5, 1.0)])
def test_f1_at_95_percent(width: float, expected: float):
    result = scores([answered("a", [(0.0, 0.0, width, 10.0)])], [make_sample("a", [(A, "x")])])
    assert (result["text_f1"], result["text_f1_95"]) == (1.0, expected)


def test_what_does_not_count():
    predictions = [make_prediction("a", []), answered("b", [A]), answered("c", [A])]
    samples = [make_sample("a", [(A, "x")]), make_sample("b", None), Sample("c", b"", 0, 0, ())]
    result = scores(predictions, samples)
    assert result.pop("text_answers") == 0 and set(result.values()) == {-1.0}


def test_empty_images():
    nothing = make_sample("a", [])
    assert scores([answered("a", [])], [nothing]) == {
        "text_f1": -1.0,
        "text_f1_95": -1.0,
        "text_miou": -1.0,
        "text_parse_failure_rate": 0.0,
        "text_answers": 1,
    }
    assert scores([answered("a", [A])], [nothing])["text_f1"] == 0.0


def test_a_box_in_a_crowd_is_no_false_positive():
    sample = make_sample("a", [(A, "x")], crowds=[(20.0, 0.0, 60.0, 40.0)])
    assert scores([answered("a", [A, B, C])], [sample])["text_f1"] == 1.0
    # two thirds of a box in a crowd excuse it at an IoU of .5, not at .95
    mostly_in = scores([answered("a", [A, (50.0, 0.0, 65.0, 10.0)])], [sample])
    assert (mostly_in["text_f1"], mostly_in["text_f1_95"]) == pytest.approx((1.0, 2 / 3))
    # a truth in a crowd is found there
    inside = make_sample("a", [(A, "x"), (B, "x")], crowds=[(0.0, 0.0, 15.0, 15.0)])
    assert scores([answered("a", [A])], [inside])["text_f1"] == pytest.approx(2 / 3)
    half_out = (50.0, 0.0, 71.0, 10.0)
    assert scores([answered("a", [A, half_out])], [sample])["text_f1"] == pytest.approx(2 / 3)


def test_boxes_a_model_may_write_but_should_not():
    boxes = [(5.0, 5.0, 5.0, 5.0), (10.0, 10.0, 0.0, 0.0), (-50.0, -50.0, 500.0, 500.0), A]
    sample = make_sample("a", [(A, "x")], crowds=[B])
    assert scores([answered("a", boxes)], [sample])["text_f1"] == pytest.approx(2 / 5)


def test_a_chat_about_something_else_does_not_count():
    chat = make_sample("a", [(A, "x")], expression="What colour is it?", answers=["Brown."])
    result = scores([unparsed("a")], [chat])
    assert result.pop("text_answers") == 0 and set(result.values()) == {-1.0}
    asked = make_sample("b", [(A, "x")], expression="Where?", answers=['[{"bbox_2d": [0, 0, 10, 10], "label": "x"}]'])
    both = scores([unparsed("a"), answered("b", [A])], [chat, asked])
    assert both.pop("text_answers") == 1
    assert both == {"text_f1": 1.0, "text_f1_95": 1.0, "text_miou": 1.0, "text_parse_failure_rate": 0.0}
