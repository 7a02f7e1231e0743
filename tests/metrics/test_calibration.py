"""`recipe.metrics.calibration`."""

import math

import pytest
import torch
from metric_cases import make_prediction, make_sample

from recipe.metrics.calibration import (
    Detections,
    ReliabilityBin,
    best_threshold,
    calibration,
    detections_of,
    f1_from,
    fit_platt,
    reliability_bins,
)
from recipe.schema import Prediction, Sample

A, B, FAR = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (80.0, 80.0, 90.0, 90.0)


def measured(predictions: list[Prediction], samples: list[Sample]) -> tuple[list[ReliabilityBin], dict[str, float]]:
    return reliability_bins(detections_of(predictions, samples)), calibration(predictions, samples)


def test_worked_by_hand():
    # .92 right, .94 wrong: mean .93, half of them right; .4 right; .04 is under the floor
    found = [(FAR, 0.94, ""), (A, 0.92, ""), (B, 0.4, ""), (FAR, 0.04, "")]
    bins, values = measured([make_prediction("a", found)], [make_sample("a", [(A, "x"), (B, "y")])])
    assert values["ece"] == pytest.approx((2 * 0.43 + 1 * 0.6) / 3)
    # F1 from .94 up 0 / 3, from .92 up 2 / 4, from .4 up 4 / 5, from .04 up 4 / 6
    assert (values["best_score_threshold"], values["best_f1"]) == pytest.approx((0.4, 0.8))
    assert [(item.low, item.high) for item in bins] == [(step / 10, (step + 1) / 10) for step in range(10)]
    assert [item.count for item in bins] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 2]
    assert (bins[9].mean_score, bins[9].precision) == pytest.approx((0.93, 0.5))
    assert (bins[0].mean_score, bins[0].precision) == (0.0, 0.0)


def test_a_truth_is_matched_once_by_the_best_score():
    found = [(A, 0.55, ""), ((1.0, 0.0, 11.0, 10.0), 0.95, "")]
    bins, values = measured([make_prediction("a", found)], [make_sample("a", [(A, "x")])])
    assert [(item.count, item.precision) for item in bins if item.count] == [(1, 0.0), (1, 1.0)]
    assert values["ece"] == pytest.approx((0.55 + 0.05) / 2)


def test_a_score_of_1_is_in_the_last_bin_and_the_floor_is_included():
    bins, _ = measured([make_prediction("a", [(A, 1.0, ""), (B, 0.05, "")])], [make_sample("a", [(A, "x")])])
    assert [item.count for item in bins] == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_calibrated_scores_have_no_error():
    # of ten detections scored .7 seven are right
    predictions = [make_prediction(str(index), [(A if index < 7 else FAR, 0.7, "")]) for index in range(10)]
    samples = [make_sample(str(index), [(A, "x")]) for index in range(10)]
    assert measured(predictions, samples)[1]["ece"] == pytest.approx(0.0, abs=1e-12)


def test_images_without_objects_or_detections():
    nothing = {"ece": -1.0, "best_score_threshold": -1.0, "best_f1": -1.0}
    assert measured([], [])[1] == nothing
    assert measured([make_prediction("a", [])], [make_sample("a", [])])[1] == nothing
    assert measured([make_prediction("a", [(A, 0.9, "")])], [make_sample("a", None)])[1] == nothing
    assert measured([make_prediction("a", [])], [make_sample("a", [(A, "x")])])[1] == nothing | {"best_f1": 0.0}
    false_alarm = measured([make_prediction("a", [(A, 0.9, "")])], [make_sample("a", [])])[1]
    assert false_alarm == {"ece": pytest.approx(0.9), "best_score_threshold": -1.0, "best_f1": 0.0}


def test_boxes_in_a_crowd_do_not_count():
    sample = make_sample("a", [(A, "x")], crowds=[(70.0, 70.0, 99.0, 99.0)])
    values = measured([make_prediction("a", [(FAR, 0.95, ""), (A, 0.85, "")])], [sample])[1]
    assert values == pytest.approx({"ece": 0.15, "best_score_threshold": 0.85, "best_f1": 1.0})


def test_what_finds_a_truth_in_a_crowd_counts():
    sample = make_sample("a", [(A, "x"), (B, "x")], crowds=[(0.0, 0.0, 15.0, 15.0)])
    values = measured([make_prediction("a", [(A, 0.9, "")])], [sample])[1]
    assert values == pytest.approx({"ece": 0.1, "best_score_threshold": 0.9, "best_f1": 2 / 3})


def test_a_score_of_exactly_the_threshold_is_above_it():
    detections = Detections(torch.tensor([0.5, 0.4]).double(), torch.tensor([True, True]), 1, 2)
    assert (f1_from(detections, 0.5), f1_from(detections, 0.4)) == (pytest.approx(2 / 3), 1.0)


def test_equal_scores_are_kept_or_dropped_together():
    scores, is_true = torch.tensor([0.5, 0.9, 0.5, 0.5]), torch.tensor([True, True, False, False])
    # from .9 up 2 / 3; from .5 up 4 / 6, not 4 / 4 as with the right one of the three alone: the higher score wins
    assert best_threshold(scores, is_true, 2) == pytest.approx((0.9, 2 / 3))
    assert best_threshold(scores[1:], is_true[1:], 1) == pytest.approx((0.9, 1.0))


def test_platt_finds_the_curve_that_made_the_truth():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(100_000, generator=generator, dtype=torch.float64) * 3
    share = (0.5 * logits - 1.0).sigmoid()
    is_true = torch.rand(len(logits), generator=generator, dtype=torch.float64) < share
    scale, bias = fit_platt(logits, is_true)
    # four standard errors, .009 and .012 of the two at this many
    assert (scale, bias) == (pytest.approx(0.5, abs=0.02), pytest.approx(-1.0, abs=0.04))


def test_platt_is_the_minimum_of_its_loss():
    logits = torch.tensor([-3.0, -1.0, 0.5, 1.0, 4.0, 6.0], dtype=torch.float64)
    is_true = torch.tensor([False, True, False, True, True, True])
    weights = torch.tensor(fit_platt(logits, is_true), dtype=torch.float64, requires_grad=True)
    targets = 1 / 4 + (5 / 6 - 1 / 4) * is_true.double()
    torch.nn.functional.binary_cross_entropy_with_logits(weights[0] * logits + weights[1], targets).backward()
    assert weights.grad is not None and float(weights.grad.abs().max()) < 1e-8


@pytest.mark.parametrize("shift", [-5.0, 0.0, 50.0])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_platt_is_a_minimum_of_any_scores(spread: float, shift: float):
    """Few or many, separable or noisy: no gradient is left in units of the scores' own spread."""
    generator = torch.Generator().manual_seed(0)
    for count in (2, 3, 10, 500):
        logits = torch.randn(count, generator=generator, dtype=torch.float64) * spread + shift
        for is_true in (logits > logits.median(), logits <= logits.median(), torch.arange(count) % 3 == 0):
            scale, bias = fit_platt(logits, is_true)
            num_true, num_false = int(is_true.sum()), int((~is_true).sum())
            high, low = (num_true + 1) / (num_true + 2), 1 / (num_false + 2)
            targets = low + (high - low) * is_true.double()
            residual = (scale * logits + bias).sigmoid() - targets
            gradient = torch.stack([residual.mean(), (residual * (logits - logits.mean()) / logits.std()).mean()])
            assert float(gradient.abs().max()) < 1e-8  # measured: 4.6e-9


def test_platt_of_separable_scores_is_finite():
    scale, bias = fit_platt(torch.tensor([-8.0, -7.0, 7.0, 8.0]), torch.tensor([False, False, True, True]))
    assert scale > 0 and math.isfinite(scale) and bias == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("truth", "target"), [(True, 5 / 6), (False, 1 / 6)])
def test_platt_of_all_true_or_all_false_moves_the_bias_alone(truth: bool, target: float):
    logits = torch.tensor([1.0, 2.0, 3.0, -50.0])
    scale, bias = fit_platt(logits, torch.full((4,), truth))
    assert scale == 1.0
    assert float((logits.double() + bias).sigmoid().mean()) == pytest.approx(target, abs=1e-6)


def test_platt_edges():
    assert fit_platt(torch.empty(0), torch.empty(0, dtype=torch.bool)) == (1.0, 0.0)
    # equal logits: 2 true of 4, so targets 3 / 4 and 1 / 4 of mean 1 / 2
    scale, bias = fit_platt(torch.full((4,), 2.0), torch.tensor([True, False, True, False]))
    assert (scale, bias) == (1.0, pytest.approx(-2.0))
    with pytest.raises(ValueError, match="1 of 2 score logits are not finite"):
        fit_platt(torch.tensor([math.inf, 0.0]), torch.tensor([True, False]))
