"""The base of every metric: which samples count, gathering over ranks, matching boxes, scalars for Composer."""

import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric
from torchvision.ops import box_area

from recipe.schema import DetectedObject, LossCounts, Object, Prediction, Sample

UNDEFINED = -1.0
"""A ratio over nothing, as COCO writes it: finite, so that every logger takes it, and no possible score."""
# What `recipe.data.chat` reads boxes from: a JSON object with this key, or an empty list.
_TEXT_OF_BOXES = re.compile(r'"bbox_2d"\s*:|\[\s*\]')


class SumMetric(Metric):
    """Sums rows of numbers over samples, batches and ranks.

    Args:
        width: Numbers of a row.
    """

    full_state_update = False

    sums: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.add_state("sums", default=torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, rows: Sequence[Sequence[float]]) -> None:
        """Adds a row a sample, if any."""
        self.sums += torch.tensor(rows, dtype=torch.float64, device=self.device).reshape(-1, len(self.sums)).sum(0)

    def totals(self) -> list[float]:
        """The sum of each column, over all ranks."""
        return self.sums.tolist()


class RowsPerSampleMetric(Metric):
    """Keeps rows of numbers, any number of them a sample.

    Args:
        width: Numbers of a row.
        dtype: Of a row.
    """

    full_state_update = False

    samples: list[Tensor]
    rows: list[Tensor]

    def __init__(self, width: int, dtype: torch.dtype = torch.float64):
        # Two long tensors a rank: torchmetrics' gather never returns where ranks hold unequally many short ones.
        super().__init__()
        self.width = width
        self.row_dtype = dtype
        self.add_state("samples", default=[], dist_reduce_fx="cat")  # (n, 3): key, rows, truths
        self.add_state("rows", default=[], dist_reduce_fx="cat")  # (r, width)

    def append(self, keys: Sequence[int], truths: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Stores samples, their truths counted, and their (r, width) rows; every update must call it, if only empty."""
        samples = [[key, len(own), count] for key, count, own in zip(keys, truths, rows, strict=True)]
        self.samples.append(torch.tensor(samples, dtype=torch.int64, device=self.device).reshape(-1, 3))
        empty = torch.empty(0, self.width, dtype=self.row_dtype)
        self.rows.append(torch.cat([empty, *rows]).to(self.device))

    def gathered(self) -> tuple[Tensor, int]:
        """The rows of all samples of all ranks, in an order that no rank or batch changes, and the number of truths."""
        _, truths, rows = self.gathered_samples()
        return torch.cat(rows), int(truths.sum())

    def gathered_samples(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Keys (n,), truths (n,) and the rows of each of the n samples of all ranks, in the same order.

        One more than n in the list: an empty one, so that it can always be concatenated.
        """
        samples, rows = joined(self.samples), joined(self.rows)
        parts = rows.split(samples[:, 1].tolist())
        order = samples[:, 0].argsort(stable=True)
        return samples[order, 0], samples[order, 2], [*(parts[index] for index in order.tolist()), rows[:0]]


def joined(state: list[Tensor] | Tensor) -> Tensor:
    """A gathered state on the CPU: a list on one rank, already one tensor after a reduction over ranks.

    Raises:
        ValueError: Nothing was added, not even an empty batch.
    """
    if isinstance(state, list):
        if not state:
            raise ValueError("compute() before any update(): evaluate at least one batch")
        return torch.cat(state).cpu()
    return state.cpu()


def stable_hash(data: bytes) -> int:
    """63 bits of `data` that all processes agree on."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big") >> 1


def sample_key(sample: Sample) -> int:
    """By which samples are put in an order that neither ranks nor batches change: the same of equal samples alone."""
    fields = (sample.id, sample.width, sample.height, sample.objects, sample.messages, stable_hash(sample.image))
    return stable_hash(repr(fields).encode())


def asks_for_boxes(sample: Sample) -> bool:
    """Whether boxes are the answer: by the first answer of its chat, which is what evaluation generates.

    The detection chat asks for boxes, and so may a chat without an answer.
    """
    answer = next((turn["content"] for turn in sample.messages or () if turn["role"] == "assistant"), None)
    if answer is None:
        return True
    text = answer if isinstance(answer, str) else "".join(part.get("text", "") for part in answer)
    return _TEXT_OF_BOXES.search(text) is not None


def normalized_caption(caption: str) -> str:
    """The form in which captions are compared."""
    return caption.strip().casefold()


def scored_pairs(
    predictions: Sequence[Prediction], samples: Sequence[Sample]
) -> Iterator[tuple[Prediction, Sample, tuple[Object, ...]]]:
    """Each prediction with its sample and the sample's objects; not annotated and text-only samples left out.

    Raises:
        ValueError: The lists do not belong together.
    """
    if [prediction.id for prediction in predictions] != [sample.id for sample in samples]:
        raise ValueError(
            f"{len(predictions)} predictions do not belong to {len(samples)} samples: "
            "pass one prediction a sample, with the sample's id, in the same order"
        )
    for prediction, sample in zip(predictions, samples, strict=True):
        if sample.objects is not None and sample.width > 0:
            yield prediction, sample, sample.objects


def boxes_of(objects: Sequence[Object] | Sequence[DetectedObject]) -> Tensor:
    """(T, 4) float64 xyxy."""
    return torch.tensor([item.box for item in objects], dtype=torch.float64).reshape(-1, 4)


def match_by_score(iou: Tensor, threshold: float) -> list[tuple[int, int]]:
    """Gives each detection, in the order of the rows, the free truth it overlaps most, from `threshold` up.

    Args:
        iou: (detections by falling score, truths).
        threshold: Least overlap of a pair.
    """
    free = iou.clone()
    pairs = []
    for detection in range(iou.shape[0] if iou.shape[1] else 0):
        overlap, truth = free[detection].max(0)
        if overlap >= threshold:
            pairs.append((detection, int(truth)))
            free[:, truth] = -1.0
    return pairs


def match_by_overlap(iou: Tensor, threshold: float) -> list[tuple[int, int]]:
    """Pairs detections and truths, which have no order, for the largest total overlap, each pair from `threshold` up.

    Args:
        iou: (detections, truths).
        threshold: Least overlap of a pair.
    """
    allowed = torch.where(iou >= threshold, iou, 0.0)
    rows, columns = linear_sum_assignment(allowed.numpy(), maximize=True)
    return [(int(row), int(column)) for row, column in zip(rows, columns, strict=True) if allowed[row, column] > 0]


def inside_crowd(boxes: Tensor, crowds: Tensor, threshold: float) -> Tensor:
    """Which of (N, 4) boxes have at least `threshold` of their area in one of (C, 4) crowd regions, as COCO counts."""
    if not len(crowds):
        return torch.zeros(len(boxes), dtype=torch.bool)
    low, high = torch.maximum(boxes[:, None, :2], crowds[:, :2]), torch.minimum(boxes[:, None, 2:], crowds[:, 2:])
    intersection = (high - low).clamp(min=0).prod(2)  # (N, C)
    return ((intersection > 0) & (intersection >= threshold * box_area(boxes)[:, None])).any(1)


class MetricEntry(Metric):
    """One scalar of a metric whose `compute` returns a dict. Entries share their source, which is computed once.

    Args:
        source: The metric.
        key: Which of its values.
        owns: Only the owning entry passes updates on.
    """

    full_state_update = False

    def __init__(self, source: Metric, key: str, owns: bool):
        super().__init__()
        self.source = source
        self.key = key
        self.owns = owns

    def update(self, *args: Any) -> None:
        """Updates the source, once for all its entries."""
        if self.owns:
            self.source.update(*args)

    def compute(self) -> Tensor:
        """The entry's value, over all ranks."""
        return self.source.compute()[self.key]

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.source.reset()


def metric_entries(source: Metric, names: Sequence[str]) -> Iterator[tuple[str, MetricEntry]]:
    """The entries `names` of one source; the first owns it."""
    for position, name in enumerate(names):
        yield name, MetricEntry(source, name, owns=position == 0)


class LossAverage(Metric):
    """The loss terms over a whole evaluation set: summed numerators over summed counts, over all batches and ranks."""

    full_state_update = False
    denominators: ClassVar[Mapping[str, str]] = {
        "loss_lm_teacher": "teacher_tokens",
        "loss_lm_student": "student_tokens",
        "loss_bbox": "objects",
        "loss_giou": "objects",
        "loss_objectness": "images",
        "loss_caption": "images",
    }

    sums: Tensor
    counts: Tensor

    def __init__(self):
        super().__init__()
        size = len(self.denominators)
        self.add_state("sums", default=torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", default=torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss_sums: Mapping[str, Tensor], counts: LossCounts) -> None:
        """Adds one batch: terms not divided yet, and what they are to be divided by."""
        self.sums += torch.stack([loss_sums[name].detach().to(self.sums) for name in self.denominators])
        self.counts += self.counts.new_tensor([counts[name] for name in self.denominators.values()])

    def compute(self) -> dict[str, Tensor]:
        """Each term's average; 0 where nothing was counted."""
        averages = self.sums / self.counts.clamp(min=1)
        return dict(zip(self.denominators, averages.float().unbind(), strict=True))
