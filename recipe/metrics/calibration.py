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
from torchvision.ops import box_iou

from recipe.config import EvaluationConfig
from recipe.metrics.gather import (
    UNDEFINED,
    RowsPerSampleMetric,
    boxes_of,
    inside_crowd,
    match_by_score,
    sample_key,
    scored_pairs,
)
from recipe.schema import Prediction, Sample


@dataclass(frozen=True)
class ReliabilityBin:
    """Detections of like score.

    Attributes:
        low: Least score, included; the first bin starts at 0, however few detections the floor leaves it.
        high: Greatest score, excluded; of the last bin 1, included.
        count: Of detections.
        mean_score: 0 where there are none.
        precision: Share of true ones; 0 where there are none.
    """

    low: float
    high: float
    count: int
    mean_score: float
    precision: float


@dataclass(frozen=True)
class Detections:
    """What was detected on some images.

    Attributes:
        scores: (D,) float64, in no order.
        is_true: (D,) bool.
        num_images: That were annotated.
        num_truths: Objects on them.
    """

    scores: Tensor
    is_true: Tensor
    num_images: int
    num_truths: int


class Calibration(RowsPerSampleMetric):
    """Scores of the detections against how many of them are true.

    A detection is true where it is matched one to one, by falling score, to the free truth it overlaps most, at an
    IoU of at least `iou_threshold`, as COCO matches. Unmatched ones in a crowd region do not count.

    `compute` returns `ece`, the expected calibration error: over the detections scored `floor` or more, the distance
    of mean score and precision in `num_bins` equal bins, weighted by their counts; without the floor the many queries
    that found nothing, scored near 0, would make any head look calibrated. `best_score_threshold` is the score from
    which up the F1 of all images is best, of equal ones the highest, and `best_f1` that F1. A value is -1 where nothing
    defines it.
    """

    def __init__(self, iou_threshold: float = 0.5, floor: float = 0.05, num_bins: int = 10):
        super().__init__(width=2)  # score, is true
        self.iou_threshold = iou_threshold
        self.floor = floor
        self.num_bins = num_bins
        self._halves: tuple[Detections, Detections] | None = None

    def update(self, predictions: list[Prediction], samples: list[Sample]) -> None:
        """Adds images.

        Raises:
            ValueError: The predictions do not belong to the samples.
        """
        keys, counts, rows = [], [], []
        for prediction, sample, objects in scored_pairs(predictions, samples):
            found = sorted(prediction.objects, key=lambda item: -item.score)
            boxes = boxes_of(found)
            truths = boxes_of([item for item in objects if not item.iscrowd])
            crowds = boxes_of([item for item in objects if item.iscrowd])
            is_true = torch.zeros(len(found), dtype=torch.bool)
            is_true[[row for row, _ in match_by_score(box_iou(boxes, truths), self.iou_threshold)]] = True
            scores = torch.tensor([item.score for item in found], dtype=torch.float64)
            counted = is_true | ~inside_crowd(boxes, crowds, self.iou_threshold)
            keys.append(sample_key(sample))
            counts.append(len(truths))
            rows.append(torch.stack([scores, is_true.double()], 1)[counted])
        self.append(keys, counts, rows)

    def compute(self) -> dict[str, Tensor]:
        """The scores, over all ranks."""
        keys, truths, parts = self.gathered_samples()
        rows = torch.cat(parts)
        is_odd = keys % 2 > 0
        of_odd = is_odd.repeat_interleave(torch.tensor([len(part) for part in parts[:-1]], dtype=torch.int64))
        self._halves = (
            Detections(*_columns(rows[~of_odd]), int((~is_odd).sum()), int(truths[~is_odd].sum())),
            Detections(*_columns(rows[of_odd]), int(is_odd.sum()), int(truths[is_odd].sum())),
        )
        threshold, f1 = best_threshold(*_columns(rows), int(truths.sum()))
        return {
            "ece": torch.tensor(expected_calibration_error(reliability_bins(rows, self.floor, self.num_bins))),
            "best_score_threshold": torch.tensor(threshold),
            "best_f1": torch.tensor(f1),
        }

    def halves(self) -> tuple[Detections, Detections]:
        """The detections on one half of the images and on the other, over all ranks, as of the last `compute`.

        Which half a sample is in depends on the sample alone.
        """
        assert self._halves is not None, "halves() before compute()"
        return self._halves


def _columns(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[:, 0], rows[:, 1] > 0


def reliability_bins(rows: Tensor, floor: float, num_bins: int) -> list[ReliabilityBin]:
    """Equal-width bins of (D, 2) scores and truths; scores below `floor` are left out."""
    scores, is_true = rows[rows[:, 0] >= floor].unbind(1)
    places = (scores * num_bins).long().clamp(0, num_bins - 1)
    counts = torch.bincount(places, minlength=num_bins)
    sums = [torch.bincount(places, weights=weights, minlength=num_bins) for weights in (scores, is_true)]
    means = [(total / counts.clamp(min=1)).tolist() for total in sums]
    return [
        ReliabilityBin(index / num_bins, (index + 1) / num_bins, count, mean_score, precision)
        for index, (count, mean_score, precision) in enumerate(zip(counts.tolist(), *means, strict=True))
    ]


def expected_calibration_error(bins: list[ReliabilityBin]) -> float:
    """Mean distance of score and precision, weighted by the detections of the bins; -1 without any."""
    total = sum(item.count for item in bins)
    if not total:
        return UNDEFINED
    return sum(item.count * abs(item.mean_score - item.precision) for item in bins) / total


def best_threshold(scores: Tensor, is_true: Tensor, num_truths: int) -> tuple[float, float]:
    """The score from which up F1 is best, and that F1; equal scores are kept or dropped together.

    Args:
        scores: (D,), in any order.
        is_true: (D,) bool.
        num_truths: Of all images.

    Returns:
        (-1, 0) without detections, (-1, -1) without detections and truths, (-1, 0) where no detection is true.
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
    """F1 of the detections scored `threshold` or more; -1 where there are neither such nor objects."""
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

    # Convex, so any minimum is the best; BFGS may stop above gtol, as far as float64 can tell the losses apart.
    return minimize(loss, np.zeros(inputs.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-10}).x


CALIBRATION_FILE = "calibration.yaml"
KEYS = ("score_scale", "score_shift", "score_threshold")
_LEAST_SCORE = 1e-7  # and greatest, from 1: what is nearer to 0 or 1 has no finite logit in single precision


@dataclass(frozen=True)
class Reliability:
    """How well the scores of some images are calibrated.

    Attributes:
        images: That were annotated.
        detections: On them.
        ece: Expected calibration error; -1 without detections.
        f1: Of the detections from the score threshold up; -1 without detections and objects.
        bins: The reliability curve.
    """

    images: int
    detections: int
    ece: float
    f1: float
    bins: list[ReliabilityBin]


@dataclass(frozen=True)
class CalibrationFit:
    """What was found.

    Attributes:
        evaluation: Values of `KEYS`.
        fitted: The half of the images that they were found on, (before, after).
        held_out: The other half.
    """

    evaluation: dict[str, float]
    fitted: tuple[Reliability, Reliability]
    held_out: tuple[Reliability, Reliability]


def find_calibration(
    fitted: Detections, held_out: Detections, evaluation: EvaluationConfig, floor: float, num_bins: int
) -> CalibrationFit:
    """Fits Platt's curve, and the threshold of the best F1 after it, on one half of the images; judges on both.

    Args:
        fitted: What both are found on.
        held_out: What tells how well they do elsewhere.
        evaluation: What the scores were made with; the result stands in its place.
        floor: Least score that counts in a calibration error.
        num_bins: Of the curve.

    Raises:
        ValueError: The fitted half has no true detection, or better scores are not truer.
    """
    if not fitted.is_true.any():
        raise ValueError(f"none of {len(fitted.scores)} detections on {fitted.num_images} images is right")
    scale, shift = fit_platt(logits_of(fitted.scores), fitted.is_true)
    if not 0 < scale < inf:
        raise ValueError(f"on {fitted.num_images} images better scores are not truer (slope {scale:.3g})")
    halves = (fitted, held_out)
    calibrated = [replace(half, scores=(logits_of(half.scores) * scale + shift).sigmoid()) for half in halves]
    threshold = _middle_threshold(calibrated[0])

    def judge(half: Detections, threshold: float) -> Reliability:
        bins = reliability_bins(torch.stack([half.scores, half.is_true.double()], 1), floor, num_bins)
        f1 = f1_from(half, threshold)
        return Reliability(half.num_images, len(half.scores), expected_calibration_error(bins), f1, bins)

    before = [judge(half, evaluation.score_threshold) for half in halves]
    after = [judge(half, threshold) for half in calibrated]
    values = {
        "score_scale": scale * evaluation.score_scale,
        "score_shift": scale * evaluation.score_shift + shift,
        "score_threshold": threshold,
    }
    return CalibrationFit(values, (before[0], after[0]), (before[1], after[1]))


def logits_of(scores: Tensor) -> Tensor:
    """Scores → logits, finite for scores of 0 and 1 too."""
    return torch.logit(scores, eps=_LEAST_SCORE)


def _middle_threshold(detections: Detections) -> float:
    """The threshold of the best F1, half-way to the next lower score: what is as good or nearly so is kept."""
    lowest, _ = best_threshold(detections.scores, detections.is_true, detections.num_truths)
    below = detections.scores[detections.scores < lowest]
    return (lowest + (float(below.max()) if len(below) else 0.0)) / 2


def calibration_text(calibration: CalibrationFit) -> str:
    """What was found, as lines to print."""
    values = calibration.evaluation
    lines = [
        f"calibrated score = sigmoid({values['score_scale']:.4g} * logit {values['score_shift']:+.4g}), "
        f"threshold of the best F1: {values['score_threshold']:.3f}",
        f"{'':<34}{'ECE before':>12}{'after':>8}{'F1 before':>12}{'after':>8}",
    ]
    for name, (before, after) in (("fitted on", calibration.fitted), ("held out", calibration.held_out)):
        what = f"{name}: {before.images} images, {before.detections} boxes"
        lines.append(f"{what:<34}{before.ece:>12.4f}{after.ece:>8.4f}{before.f1:>12.3f}{after.f1:>8.3f}")
    lines.append(f"{'held out, scores':<20}{'before: count  score  right':>30}{'after: count  score  right':>30}")
    for before, after in zip(*(part.bins for part in calibration.held_out), strict=True):
        cells = [f"{item.count:>16}{item.mean_score:>7.3f}{item.precision:>7.3f}" for item in (before, after)]
        lines.append(f"{f'{before.low:.1f} to {before.high:.1f}':<20}" + "".join(cells))
    return "\n".join(lines)


def write_calibration(calibration: CalibrationFit, path: Path) -> None:
    """Writes `CALIBRATION_FILE`."""
    names = ("before", "after")
    report = {
        half: {name: asdict(part) for name, part in zip(names, getattr(calibration, half), strict=True)}
        for half in ("fitted", "held_out")
    }
    content = {"evaluation": calibration.evaluation, "report": report}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def read_calibration(path: Path, evaluation: EvaluationConfig) -> EvaluationConfig:
    """The way to predict with the values of a calibration file in it.

    Raises:
        ValueError: It is no such file, or a value cannot be.
    """
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot read the calibration {path}: {reason}") from error
    values = content.get("evaluation") if isinstance(content, dict) else None
    if not isinstance(values, dict) or set(values) != set(KEYS) or not _are_numbers(list(values.values())):
        raise ValueError(f"{path} is no calibration: it needs evaluation with the numbers {', '.join(KEYS)}")
    if not values["score_scale"] > 0 or not 0 <= values["score_threshold"] <= 1:
        raise ValueError(f"{path}: score_scale must be above 0 and score_threshold between 0 and 1, not {values}")
    return replace(evaluation, **values)


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(type(value) in (int, float) and -inf < value < inf for value in values)
