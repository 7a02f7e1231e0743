"""Do scores mean what they say? Reliability of the detections, the best score threshold, and Platt's mend."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from recipe.metrics.samples import (
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


def fit_platt(score_logits: Tensor, is_true: Tensor, max_steps: int = 100) -> tuple[float, float]:
    """Platt scaling: the `scale` and `bias` with which `sigmoid(scale * logit + bias)` is the share of true ones.

    Newton's method on Platt's smoothed targets, (T + 1) / (T + 2) for the T true and 1 / (F + 2) for the F false
    ones (Platt 1999; Lin, Lin and Weng 2007), so that all true or all false gives a finite answer.

    Args:
        score_logits: (D,) objectness before the sigmoid.
        is_true: (D,) bool.
        max_steps: Newton steps at most; it mostly takes under ten.

    Returns:
        `(1, 0)`, which changes nothing, without detections. Where all are true or all are false, or all logits are
        equal, they say nothing about the scale: it stays 1, and only the bias is fitted.

    Raises:
        ValueError: A logit is not finite.
    """
    logits = score_logits.detach().double().flatten().cpu()
    if not logits.isfinite().all():
        raise ValueError(f"{int((~logits.isfinite()).sum())} of {len(logits)} score logits are not finite: drop them")
    if not len(logits):
        return 1.0, 0.0
    truth = is_true.detach().flatten().cpu().bool()
    num_true = int(truth.sum())
    num_false = len(truth) - num_true
    targets = torch.where(truth, (num_true + 1) / (num_true + 2), 1 / (num_false + 2)).double()
    fits_scale = num_true > 0 and num_false > 0 and float(logits.max() - logits.min()) > 0
    inputs = torch.stack([logits if fits_scale else torch.zeros_like(logits), torch.ones_like(logits)], 1)  # (D, 2)
    fixed = torch.zeros_like(logits) if fits_scale else logits
    weights = torch.zeros(2, dtype=torch.float64)

    def loss_of(weights: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(inputs @ weights + fixed, targets)

    loss = loss_of(weights)
    for _ in range(max_steps):
        share = (inputs @ weights + fixed).sigmoid()
        gradient = inputs.T @ (share - targets) / len(logits)
        curvature = (inputs * (share * (1 - share))[:, None]).T @ inputs / len(logits)
        step = torch.linalg.solve(curvature + 1e-12 * torch.eye(2, dtype=torch.float64), gradient)
        size = 1.0
        while size > 1e-10 and loss_of(weights - size * step) > loss:
            size /= 2
        weights, before = weights - size * step, loss
        loss = loss_of(weights)
        if before - loss < 1e-14:
            break
    return (float(weights[0]) if fits_scale else 1.0), float(weights[1])
