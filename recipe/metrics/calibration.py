"""Calibrate scores: measure reliability, fit Platt scaling and the best threshold, write and read the result."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from recipe.config import EvaluationConfig
from recipe.metrics.gather import IGNORED, UNDEFINED, Evaluation, found_truths, is_unsure, scored_pairs
from recipe.schema import Prediction, Sample


@dataclass(frozen=True)
class ReliabilityBin:
    """Detections of similar score."""

    low: float  # least score, included
    high: float  # greatest score, excluded except in the last bin
    count: int  # of detections
    mean_score: float  # 0 without detections
    precision: float  # share of true detections; 0 without any


@dataclass(frozen=True)
class Detections:
    """What was detected on some images."""

    scores: Tensor  # (D,) float64, in no order
    is_true: Tensor  # (D,) bool
    num_images: int  # annotated ones
    num_truths: int  # objects on them


def detections_of(
    predictions: Sequence[Prediction], samples: Sequence[Sample], iou_threshold: float = 0.5
) -> Detections:
    """Judge every detection as COCO does.

    By falling score, a detection is true if it takes the free truth that it overlaps most, at an IoU of at least
    `iou_threshold`. Unmatched detections in a crowd region, or of `is_unsure`, do not count.
    """
    scores, is_true = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.bool)]
    num_images, num_truths = 0, 0
    for prediction, sample, objects in scored_pairs(predictions, samples):
        found = sorted(prediction.objects, key=lambda item: -item.score)
        places = torch.tensor(found_truths(found, objects, iou_threshold, is_unsure(found, sample)), dtype=torch.int64)
        counted = places != IGNORED
        scores.append(torch.tensor([item.score for item in found], dtype=torch.float64)[counted])
        is_true.append(places[counted] >= 0)
        num_images += 1
        num_truths += sum(not item.iscrowd for item in objects)
    return Detections(torch.cat(scores), torch.cat(is_true), num_images, num_truths)


def detections_of_halves(evaluation: Evaluation) -> tuple[Detections, Detections]:
    """Judge the detections of both halves of the images, split by sample key, after `evaluation.compute()`."""
    even, odd = ([row[1:] for row in evaluation.evaluated if row[0] % 2 == half] for half in (0, 1))
    first, second = (detections_of([row[0] for row in half], [row[1] for row in half]) for half in (even, odd))
    return first, second


def calibration(predictions: Sequence[Prediction], samples: Sequence[Sample]) -> dict[str, float]:
    """Compare the scores of detections with how many of them are true.

    Returns:
        `ece`: expected calibration error, see `reliability_bins`.
        `best_score_threshold`: the least score to keep for the best F1 over all images; of equal ones the highest.
        `best_f1`: that F1. A value is -1 if nothing defines it.
    """
    found = detections_of(predictions, samples)
    threshold, f1 = best_threshold(found.scores, found.is_true, found.num_truths)
    error = expected_calibration_error(reliability_bins(found))
    return {"ece": error, "best_score_threshold": threshold, "best_f1": f1}


def reliability_bins(detections: Detections, floor: float = 0.05, num_bins: int = 10) -> list[ReliabilityBin]:
    """Sort detections into `num_bins` bins of [0, 1] of equal width.

    Scores below `floor` are left out: the many queries that found nothing would make any head look calibrated.
    """
    kept = detections.scores >= floor
    scores, is_true = detections.scores[kept], detections.is_true[kept].double()
    places = (scores * num_bins).long().clamp(0, num_bins - 1)
    counts = torch.bincount(places, minlength=num_bins)
    sums = [torch.bincount(places, weights=weights, minlength=num_bins) for weights in (scores, is_true)]
    means = [(total / counts.clamp(min=1)).tolist() for total in sums]
    return [
        ReliabilityBin(index / num_bins, (index + 1) / num_bins, count, mean_score, precision)
        for index, (count, mean_score, precision) in enumerate(zip(counts.tolist(), *means, strict=True))
    ]


def expected_calibration_error(bins: list[ReliabilityBin]) -> float:
    """Return the mean distance of score and precision, weighted by the bins' detections; -1 without any."""
    total = sum(item.count for item in bins)
    if not total:
        return UNDEFINED
    return sum(item.count * abs(item.mean_score - item.precision) for item in bins) / total


def best_threshold(scores: Tensor, is_true: Tensor, num_truths: int) -> tuple[float, float]:
    """Return the least score to keep for the best F1, and that F1; equal scores are kept or dropped together.

    `scores` (D,), in any order, and `is_true` (D,) are of all images. The result is (-1, -1) without detections and
    truths, otherwise (-1, 0) if no detection is true.
    """
    if not len(scores):
        return UNDEFINED, 0.0 if num_truths else UNDEFINED
    ordered, order = scores.sort(descending=True)
    hits = is_true[order].double().cumsum(0)
    f1 = 2 * hits / (torch.arange(1, len(hits) + 1) + num_truths)
    ends_a_tie = torch.ones(len(hits), dtype=torch.bool)
    ends_a_tie[:-1] = ordered[1:] != ordered[:-1]
    candidates = torch.where(ends_a_tie, f1, -1.0)
    best = int(candidates.numpy().argmax())  # of equal ones the first, which torch does not promise
    return (float(ordered[best]), float(f1[best])) if hits[-1] else (UNDEFINED, 0.0)


def f1_from(detections: Detections, threshold: float) -> float:
    """Return the F1 of the detections scored `threshold` or more; -1 if there are neither such nor objects."""
    kept = detections.is_true[detections.scores >= threshold]
    total = len(kept) + detections.num_truths
    return 2 * float(kept.sum()) / total if total else UNDEFINED


def fit_platt(score_logits: Tensor, is_true: Tensor) -> tuple[float, float]:
    """Return the `scale` and `bias` with which `sigmoid(scale * logit + bias)` is the share of true ones.

    Platt scaling, with Platt's smoothed targets, (T + 1) / (T + 2) for the T true and 1 / (F + 2) for the F false ones
    (Platt 1999; Lin, Lin and Weng 2007), so that all true or all false gives a finite answer.

    Args:
        score_logits: (D,) objectness before the sigmoid.
        is_true: (D,) bool.

    Returns:
        `(1, 0)`, which changes nothing, without detections. If all are true, all are false or all logits are equal,
        they say nothing about the scale: it stays 1, and only the bias is fitted.

    Raises:
        ValueError: A logit is not finite.
    """
    logits = score_logits.detach().double().flatten().cpu().numpy()
    if not np.isfinite(logits).all():
        raise ValueError(f"{(~np.isfinite(logits)).sum()} of {len(logits)} score logits are not finite: drop them")
    if not len(logits):
        return 1.0, 0.0
    truth = is_true.detach().flatten().cpu().bool().numpy()
    num_true, num_false = int(truth.sum()), int((~truth).sum())
    targets = np.where(truth, (num_true + 1) / (num_true + 2), 1 / (num_false + 2))
    ones, spread = np.ones_like(logits), float(logits.std())
    if not (num_true and num_false and spread):
        return 1.0, float(_logistic_fit(ones[:, None], logits, targets)[0])
    center = float(logits.mean())
    inputs = np.stack([(logits - center) / spread, ones], axis=1)  # of one size: else the fit is slow and less exact
    scale, bias = _logistic_fit(inputs, np.zeros_like(logits), targets) / (spread, 1.0)
    return float(scale), float(bias - scale * center)


def _logistic_fit(inputs: np.ndarray, offset: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the weights (K,) whose `inputs` (D, K) @ weights + `offset` (D,) are the likeliest logits of `targets`."""

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = inputs @ weights + offset
        value = np.mean(np.logaddexp(0, logits) - targets * logits)
        return float(value), inputs.T @ (expit(logits) - targets) / len(targets)

    # Convex, so any minimum is the best; BFGS may stop above gtol, where float64 no longer separates the losses.
    return minimize(loss, np.zeros(inputs.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-10}).x


CALIBRATION_FILE = "calibration.yaml"
KEYS = ("score_scale", "score_shift", "score_threshold")
_LEAST_SCORE = 1e-7  # also the least distance from 1: nearer scores have no finite logit in single precision


@dataclass(frozen=True)
class Reliability:
    """How well the scores of some images are calibrated."""

    images: int  # annotated ones
    detections: int  # on them
    ece: float  # expected calibration error; -1 without detections
    f1: float  # of the detections from the score threshold up; -1 without detections and objects
    bins: list[ReliabilityBin]


@dataclass(frozen=True)
class CalibrationFit:
    """A calibration, and how well it works: what is in the file."""

    evaluation: dict[str, float]  # values of `KEYS`
    report: dict[str, dict[str, Reliability]]  # of both halves, `fitted` and `held_out`: `before` and `after`


LEAST_RIGHT = 10  # detections per half; fewer say nothing about two parameters and a threshold


def check_enough(fitted: Detections, held_out: Detections) -> None:
    """Raise ValueError if either half has fewer than `LEAST_RIGHT` true detections."""
    for name, half in (("fitted", fitted), ("held-out", held_out)):
        right = int(half.is_true.sum())
        if right < LEAST_RIGHT:
            raise ValueError(
                f"{right} of {len(half.scores)} detections on the {half.num_images} images of the {name} half are "
                f"right, and {LEAST_RIGHT} are needed: evaluate more images, or train for longer"
            )


def find_calibration(fitted: Detections, held_out: Detections, evaluation: EvaluationConfig) -> CalibrationFit:
    """Fit Platt's curve, and then the threshold of the best F1, on one half of the images; judge both halves.

    `held_out` shows how well the fit generalizes. `evaluation` is what the scores were computed with; the result
    replaces its values.

    Raises:
        ValueError: The fitted half has no true detection, or better scores are not truer.
    """
    if not fitted.is_true.any():
        raise ValueError(f"none of {len(fitted.scores)} detections on {fitted.num_images} images is right")
    scale, shift = fit_platt(torch.logit(fitted.scores, eps=_LEAST_SCORE), fitted.is_true)
    if not 0 < scale < inf:
        raise ValueError(f"on {fitted.num_images} images better scores are not truer (slope {scale:.3g})")
    before = {"fitted": fitted, "held_out": held_out}
    after = {
        name: replace(half, scores=(torch.logit(half.scores, eps=_LEAST_SCORE) * scale + shift).sigmoid())
        for name, half in before.items()
    }
    scores = after["fitted"].scores
    lowest, _ = best_threshold(scores, fitted.is_true, fitted.num_truths)
    below = scores[scores < lowest]
    threshold = (lowest + (float(below.max()) if len(below) else 0.0)) / 2  # half-way to the next lower score

    def judge(half: Detections, threshold: float) -> Reliability:
        bins, f1 = reliability_bins(half), f1_from(half, threshold)
        return Reliability(half.num_images, len(half.scores), expected_calibration_error(bins), f1, bins)

    report = {
        name: {"before": judge(half, evaluation.score_threshold), "after": judge(after[name], threshold)}
        for name, half in before.items()
    }
    values = {
        "score_scale": scale * evaluation.score_scale,
        "score_shift": scale * evaluation.score_shift + shift,
        "score_threshold": threshold,
    }
    return CalibrationFit(values, report)


def calibration_text(calibration: CalibrationFit) -> str:
    """Return the calibration as text to print."""
    values = calibration.evaluation
    lines = [
        f"calibrated score = sigmoid({values['score_scale']:.4g} * logit {values['score_shift']:+.4g}), "
        f"threshold of the best F1: {values['score_threshold']:.3f}",
        f"{'':<34}{'ECE before':>12}{'after':>8}{'F1 before':>12}{'after':>8}",
    ]
    for name, half in (("fitted on", "fitted"), ("held out", "held_out")):
        before, after = calibration.report[half].values()
        what = f"{name}: {before.images} images, {before.detections} boxes"
        lines.append(f"{what:<34}{before.ece:>12.4f}{after.ece:>8.4f}{before.f1:>12.3f}{after.f1:>8.3f}")
    lines.append(f"{'held out, scores':<20}{'before: count  score  right':>30}{'after: count  score  right':>30}")
    for before, after in zip(*(part.bins for part in calibration.report["held_out"].values()), strict=True):
        cells = [f"{item.count:>16}{item.mean_score:>7.3f}{item.precision:>7.3f}" for item in (before, after)]
        lines.append(f"{f'{before.low:.1f} to {before.high:.1f}':<20}" + "".join(cells))
    return "\n".join(lines)


def write_calibration(calibration: CalibrationFit, path: Path) -> None:
    """Write a calibration as yaml."""
    path.write_text(yaml.safe_dump(asdict(calibration), sort_keys=False), encoding="utf-8")


def read_calibration(path: Path, evaluation: EvaluationConfig) -> EvaluationConfig:
    """Return `evaluation` with the values of a calibration file; raise ValueError if they are missing or invalid."""
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot read the calibration {path}: {reason}") from error
    values = content.get("evaluation") if isinstance(content, dict) else None
    are_numbers = isinstance(values, dict) and all(type(v) in (int, float) and -inf < v < inf for v in values.values())
    if not isinstance(values, dict) or set(values) != set(KEYS) or not are_numbers:
        raise ValueError(f"{path} is not a calibration: it needs evaluation with the numbers {', '.join(KEYS)}")
    if not values["score_scale"] > 0 or not 0 <= values["score_threshold"] <= 1:
        raise ValueError(f"{path}: score_scale must be above 0 and score_threshold between 0 and 1, not {values}")
    return replace(evaluation, **values)
