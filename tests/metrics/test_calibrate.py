"""`recipe.metrics.calibration`: found on one half of the images, written, and used for predictions."""

from collections.abc import Sequence
from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.optimize import minimize
from torch import Tensor

from recipe.config import EvaluationConfig
from recipe.metrics.boxes import box_average_precision
from recipe.metrics.calibration import (
    LEAST_RIGHT,
    Detections,
    calibration,
    calibration_text,
    check_enough,
    detections_of_halves,
    find_calibration,
    fit_platt,
    read_calibration,
    write_calibration,
)
from recipe.metrics.gather import Evaluation
from recipe.prediction.decode import calibrated_scores
from recipe.schema import Box, DetectedObject, LossCounts, Object, Prediction, Sample

AS_IT_IS = EvaluationConfig()
NOTHING = Detections(torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.bool), 0, 0)


def detections(scores: Sequence[float], is_true: Sequence[int], num_truths: int | None = None) -> Detections:
    truths = sum(is_true) if num_truths is None else num_truths
    return Detections(torch.tensor(scores, dtype=torch.float64), torch.tensor(is_true) > 0, len(scores), truths)


# Of four boxes scored .5 one is right, of four scored .8 three are.
HALF = detections([0.5] * 4 + [0.8] * 4, [1, 0, 0, 0, 1, 1, 1, 0])


def find(fitted: Detections, held_out: Detections = NOTHING, evaluation: EvaluationConfig = AS_IT_IS):
    return find_calibration(fitted, held_out, evaluation)


def test_worked_by_hand():
    """Platt's targets of 4 true and 4 false are 5/6 and 1/6, so the two scores are to become 1/3 and 2/3."""
    found = find(HALF, detections([0.8, 0.8, 0.5], [1, 1, 0], num_truths=3))
    # sigmoid(shift) = 1/3, sigmoid(scale * log 4 + shift) = 2/3
    assert found.evaluation["score_scale"] == pytest.approx(1.0)
    assert found.evaluation["score_shift"] == pytest.approx(-log(2))
    # F1 from 2/3 up 2 * 3 / (4 + 4), from 1/3 up 2 * 4 / (8 + 4); half-way between the two scores
    assert found.evaluation["score_threshold"] == pytest.approx(0.5)
    before, after = found.report["fitted"].values()
    assert (before.ece, after.ece) == (pytest.approx((0.25 + 0.05) / 2), pytest.approx(1 / 12))
    assert (before.f1, after.f1) == (pytest.approx(2 * 4 / 12), pytest.approx(0.75))  # the threshold before is .3
    before, after = found.report["held_out"].values()
    assert (before.ece, after.ece) == (pytest.approx((2 * 0.2 + 0.5) / 3), pytest.approx((2 / 3 + 1 / 3) / 3))
    assert (before.f1, after.f1) == (pytest.approx(4 / 6), pytest.approx(4 / 5))
    assert (before.images, before.detections) == (3, 3)
    assert [item.count for item in after.bins] == [0, 0, 0, 1, 0, 0, 2, 0, 0, 0]
    text = calibration_text(found).splitlines()
    assert "sigmoid(1 * logit -0.6931), threshold of the best F1: 0.500" in text[0]
    assert text[3].split() == ["held", "out:", "3", "images,", "3", "boxes", "0.3000", "0.3333", "0.667", "0.800"]
    assert text[11].split() == ["0.6", "to", "0.7", "0", "0.000", "0.000", "2", "0.667", "1.000"]


@pytest.mark.parametrize("number", [0, LEAST_RIGHT - 1, LEAST_RIGHT])
def test_a_few_right_detections_are_not_enough(number: int):
    enough = detections([0.6] * (LEAST_RIGHT + 3), [1] * LEAST_RIGHT + [0] * 3)
    few = detections([0.6] * 20, [1] * number + [0] * (20 - number))
    check_enough(enough, enough)
    for halves, name in (((few, enough), "fitted"), ((enough, few), "held-out")):
        if number == LEAST_RIGHT:
            check_enough(*halves)
            continue
        with pytest.raises(ValueError, match=rf"^{number} of 20 detections on the 20 images of the {name} half"):
            check_enough(*halves)


def test_calibrating_once_more_stands_in_the_place_of_the_first():
    """sigmoid(scale * (2 * logit + 1) + shift), in one; .6 and .8 are to become 1/3 and 2/3."""
    half = detections([0.6] * 4 + [0.8] * 4, [1, 0, 0, 0, 1, 1, 1, 0])
    found = find(half, evaluation=EvaluationConfig(score_scale=2.0, score_shift=1.0)).evaluation
    scale = 2 * log(2) / log(4 / 1.5)
    shift = log(2) - scale * log(4)
    assert (found["score_scale"], found["score_shift"]) == (pytest.approx(2 * scale), pytest.approx(scale + shift))


def test_platt_is_what_scipy_finds():
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 3, 500)
    is_true = rng.random(500) < 1 / (1 + np.exp(-(0.6 * logits - 0.8)))
    targets = np.where(is_true, (is_true.sum() + 1) / (is_true.sum() + 2), 1 / ((~is_true).sum() + 2))

    def loss(weights: np.ndarray) -> float:
        values = weights[0] * logits + weights[1]
        return float(np.mean(np.logaddexp(0, values) - targets * values))

    expected = minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-9}).x
    # measured: 4e-9
    assert fit_platt(torch.tensor(logits), torch.tensor(is_true)) == pytest.approx(tuple(expected), abs=1e-6)


def test_the_calibration_of_many_is_better_on_those_it_was_not_found_on():
    generator = torch.Generator().manual_seed(0)

    def draw() -> Detections:
        logits = torch.randn(20_000, generator=generator, dtype=torch.float64) * 2 - 1
        is_true = torch.rand(20_000, generator=generator, dtype=torch.float64) < (2 * logits + 1).sigmoid()
        return Detections(logits.sigmoid(), is_true, 200, int(is_true.sum()))

    held_out = find(draw(), draw()).report["held_out"]
    assert held_out["before"].ece > 0.1 and held_out["after"].ece < 0.01
    assert held_out["after"].f1 >= held_out["before"].f1


@pytest.mark.parametrize(
    ("half", "message"),
    [
        (NOTHING, "none of 0 detections on 0 images is right"),
        (detections([0.9, 0.2], [0, 0]), "none of 2 detections"),
        (detections([0.9, 0.8, 0.2, 0.1], [0, 0, 1, 1]), r"better scores are not truer \(slope -"),
    ],
    ids=["nothing", "none_true", "upside_down"],
)
def test_what_cannot_be_fitted_is_told(half: Detections, message: str):
    with pytest.raises(ValueError, match=message):
        find(half)


@pytest.mark.parametrize(
    "half",
    [
        detections([1.0, 1.0, 0.0, 0.0], [1, 1, 0, 0]),
        detections([0.9, 0.8], [1, 1]),
        detections([0.7], [1]),
        detections([0.5, 0.5], [1, 0]),
    ],
    ids=["separable", "all_true", "one", "equal"],
)
def test_odd_halves_give_a_usable_calibration(half: Detections, tmp_path: Path):
    found = find(half)
    write_calibration(found, tmp_path / "calibration.yaml")
    read = read_calibration(tmp_path / "calibration.yaml", AS_IT_IS)
    assert 0 < read.score_scale < 1e3 and abs(read.score_shift) < 1e3
    fitted, held_out = found.report["fitted"], found.report["held_out"]
    assert fitted["after"].f1 == max(part.f1 for part in fitted.values())
    assert held_out["after"].ece == held_out["after"].f1 == -1.0
    assert len(calibration_text(found).splitlines()) == 15


def test_what_is_written_is_read(tmp_path: Path):
    found = find(HALF, HALF)
    path = tmp_path / "calibration.yaml"
    write_calibration(found, path)
    run = EvaluationConfig(max_captions=7)
    assert read_calibration(path, run) == replace(run, **found.evaluation)
    report = yaml.safe_load(path.read_text())["report"]
    assert report["held_out"]["before"]["ece"] == pytest.approx(0.15)
    assert report["held_out"]["after"]["bins"][6] == {
        "low": 0.6, "high": 0.7, "count": 4, "mean_score": pytest.approx(2 / 3), "precision": 0.75
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the calibration .*No such file"),
        ("a: [", "cannot read the calibration"),
        ("- 1", "is not a calibration: it needs evaluation"),
        ("evaluation: {score_scale: 1.0, score_shift: 0.0}", "is not a calibration"),
        ("evaluation: {score_scale: 1.0, score_shift: .nan, score_threshold: 0.5}", "is not a calibration"),
        ("evaluation: {score_scale: '1', score_shift: 0.0, score_threshold: 0.5}", "is not a calibration"),
        ("evaluation: {score_scale: -1.0, score_shift: 0.0, score_threshold: 0.5}", "score_scale must be above 0"),
        ("evaluation: {score_scale: 1.0, score_shift: 0.0, score_threshold: 1.5}", "between 0 and 1"),
    ],
)
def test_another_file_is_refused(text: str | None, message: str, tmp_path: Path):
    path = tmp_path / "calibration.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_calibration(path, AS_IT_IS)


def test_average_precision_does_not_move():
    """A steep scale makes scores of single precision equal, and the order of equal scores another."""
    generator = torch.Generator().manual_seed(0)
    samples, logits, boxes = [], [], []
    for number in range(20):
        corner = torch.rand(12, 2, generator=generator) * 60
        truth = torch.cat([corner, corner + 25], 1)
        found = truth + torch.randn(12, 4, generator=generator) * 2
        objects = tuple(Object(to_box(row), "x") for row in truth[:6])
        samples.append(Sample(str(number), b"", 100, 100, objects))
        logits.append(torch.randn(12, generator=generator) * 4)
        boxes.append([to_box(row) for row in found])

    def measured(evaluation: EvaluationConfig) -> dict[str, float]:
        predictions = []
        for sample, row, places in zip(samples, logits, boxes, strict=True):
            scores, order = calibrated_scores(row, evaluation).sort(descending=True)
            found = (DetectedObject(places[i], s, "") for i, s in zip(order.tolist(), scores.tolist(), strict=True))
            predictions.append(Prediction(sample.id, 100, 100, tuple(found)))
        return box_average_precision(predictions, samples)

    expected = measured(AS_IT_IS)
    assert 0.1 < expected["box_ap"] < 0.9
    for scale, shift in ((0.2, -3.0), (3.0, -1.5)):
        assert measured(EvaluationConfig(score_scale=scale, score_shift=shift)) == expected


def to_box(row: Tensor) -> Box:
    x1, y1, x2, y2 = row.tolist()
    return x1, y1, x2, y2


def test_halves_are_of_images_by_their_keys_alone():
    """Every detection is in one half with all of its image, whatever the order; each half counts its own objects."""
    box: Box = (0.0, 0.0, 10.0, 10.0)
    samples = [Sample(str(n), b"", 100, 100, (Object(box, "x"),) * (1 + n % 3)) for n in range(40)]
    predictions = [
        Prediction(s.id, 100, 100, (DetectedObject(box, (int(s.id) + 1) / 50, ""),) * (int(s.id) % 4)) for s in samples
    ]
    losses = dict.fromkeys(Evaluation.denominators, torch.tensor(0.0))
    counts = LossCounts(teacher_tokens=0, student_tokens=0, objects=0, images=0, microbatches=1)
    halves = []
    for order in (1, -1):
        metric = Evaluation(calibration)
        for prediction, sample in list(zip(predictions, samples, strict=True))[::order]:
            metric.update([prediction], [sample], losses, counts)
        metric.compute()
        halves.append(detections_of_halves(metric))
    for half, other in zip(*halves, strict=True):
        assert torch.equal(half.scores, other.scores) and torch.equal(half.is_true, other.is_true)
        assert 10 <= half.num_images <= 30
    first, second = halves[0]
    assert first.num_images + second.num_images == 40
    assert first.num_truths + second.num_truths == sum(1 + n % 3 for n in range(40))
    images = [{round(score * 50) - 1 for score in half.scores.tolist()} for half in (first, second)]
    assert not images[0] & images[1]
    assert len(first.scores) + len(second.scores) == sum(n % 4 for n in range(40))
