"""Scores that mean what they say: found on an evaluated set, written to a file, read where predictions are made.

`calibration.yaml`, whose first section is one of a run's configuration:

    evaluation: {score_scale: 0.81, score_shift: -0.42, score_threshold: 0.37}
    report: what that was found on and what it does
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from recipe.config import EvaluationConfig
from recipe.metrics.calibration import (
    Detections,
    ReliabilityBin,
    best_threshold,
    expected_calibration_error,
    f1_from,
    fit_platt,
    reliability_bins,
)

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
