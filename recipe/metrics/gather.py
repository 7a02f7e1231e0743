"""Gather predictions over ranks, choose the samples that count, and match boxes.

A score is a function of (predictions, samples). `Evaluation` is the only metric: it gathers predictions and samples
over batches and ranks, then calls all score functions.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric
from torchvision.ops import box_area, box_iou

from recipe.schema import DetectedObject, LossCounts, Object, Prediction, Sample

FALSE, IGNORED = -1, -2  # instead of the truth that a detection finds
UNDEFINED = -1.0  # a ratio over nothing, as in COCO: finite, so that every logger takes it, and not a possible score
Scores = Callable[[Sequence[Prediction], Sequence[Sample]], dict[str, float]]


LANGUAGE_LOSSES = {"loss_lm_teacher": "teacher_tokens", "loss_lm_student": "student_tokens"}


class Evaluation(Metric):
    """Computes loss averages and scores of a whole evaluation set, over all batches and ranks.

    Each loss term is its summed numerators over its summed counts; 0 if nothing was counted.

    Args:
        scores: Called with all annotated samples of all ranks, ordered by `sample_key` and without image bytes. Called
            without samples it must return the same names.
        category_scores: The same, of scores that `with_categories=False` leaves out.
        with_head: False: only the losses of the language model.

    Attributes:
        with_categories: Whether `category_scores` are computed. They read captions that no other score does.
        evaluated: After `compute`: (key, prediction, sample) of all samples.
    """

    full_state_update = False
    denominators: Mapping[str, str] = {
        **LANGUAGE_LOSSES,
        "loss_bbox": "objects",
        "loss_giou": "objects",
        "loss_objectness": "images",
        "loss_caption": "images",
    }

    records: list[Tensor]
    loss_sums: Tensor
    loss_counts: Tensor

    def __init__(self, scores: Scores, category_scores: Scores | None = None, with_head: bool = True):
        super().__init__()
        if not with_head:
            self.denominators = LANGUAGE_LOSSES
        self.scores = scores
        self.category_scores = category_scores or no_scores
        self.with_categories = True
        self.category_names = tuple(self.category_scores([], []))
        self.names = (*self.denominators, *scores([], []), *self.category_names)
        self.evaluated: list[tuple[int, Prediction, Sample]] = []
        # One long tensor per rank: torchmetrics' gather hangs if ranks hold unequally many short ones.
        self.add_state("records", default=[], dist_reduce_fx="cat")  # bytes of JSON lines
        zeros = torch.zeros(len(self.denominators), dtype=torch.float64)
        self.add_state("loss_sums", default=zeros, dist_reduce_fx="sum")
        self.add_state("loss_counts", default=zeros.clone(), dist_reduce_fx="sum")

    def update(
        self,
        predictions: Sequence[Prediction],
        samples: Sequence[Sample],
        loss_sums: Mapping[str, Tensor],
        counts: LossCounts,
    ) -> None:
        """Add one batch: the annotated samples with an image, and loss terms before the division by `counts`."""
        lines = [
            json.dumps([sample_key(sample), prediction.to_json(), {**sample.to_mds(), "image": None}]) + "\n"
            for prediction, sample, _ in scored_pairs(predictions, samples)
        ]
        text = bytearray("".join(lines).encode())
        self.records.append(torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8))
        self.records[-1] = self.records[-1].to(self.device)
        self.loss_sums += torch.stack([loss_sums[name].detach().to(self.loss_sums) for name in self.denominators])
        self.loss_counts += self.loss_counts.new_tensor([counts[name] for name in self.denominators.values()])

    def compute(self) -> dict[str, Tensor]:
        """Return all `names` that are computed, over all ranks; fills `evaluated` with what the scores come from.

        Raises:
            ValueError: Nothing was added, not even an empty batch.
        """
        if isinstance(self.records, list) and not self.records:
            raise ValueError("compute() before any update(): evaluate at least one batch")
        records = torch.cat(self.records) if isinstance(self.records, list) else self.records
        rows = [json.loads(line) for line in records.cpu().numpy().tobytes().splitlines()]
        # The order does not depend on ranks or batches, so equal scores always rank the same.
        rows.sort(key=lambda row: row[0])
        self.evaluated = [
            (key, Prediction.from_json(prediction), Sample.from_mds({**sample, "image": b""}))
            for key, prediction, sample in rows
        ]
        values = dict(zip(self.denominators, (self.loss_sums / self.loss_counts.clamp(min=1)).tolist(), strict=True))
        predictions, samples = [item for _, item, _ in self.evaluated], [item for _, _, item in self.evaluated]
        values |= self.scores(predictions, samples)
        if self.with_categories:
            values |= self.category_scores(predictions, samples)
        return {name: torch.tensor(value) for name, value in values.items()}

    def entries(self) -> dict[str, Metric]:
        """Return one scalar metric per name, as Composer logs them; only the first passes updates on."""
        return {name: MetricEntry(self, name, owns=index == 0) for index, name in enumerate(self.names)}


def no_scores(predictions: Sequence[Prediction], samples: Sequence[Sample]) -> dict[str, float]:
    """Return nothing."""
    return {}


class MetricEntry(Metric):
    """One scalar of an `Evaluation`, which all entries share; only the entry that `owns` it passes updates on."""

    full_state_update = False

    def __init__(self, source: Evaluation, key: str, owns: bool):
        super().__init__()
        self.source = source
        self.key = key
        self.owns = owns

    def update(self, *args: Any) -> None:
        """Update the source, once for all its entries."""
        if self.owns:
            self.source.update(*args)

    def compute(self) -> Tensor:
        """Return the entry's value, over all ranks."""
        return self.source.compute()[self.key]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.source.reset()


def sample_key(sample: Sample) -> int:
    """Return a number to order samples by, equal only for equal samples, whatever their rank or batch."""
    fields = (sample.id, sample.width, sample.height, sample.objects, sample.messages, stable_hash(sample.image))
    return stable_hash(repr(fields if sample.searched is None else (*fields, sample.searched)).encode())


def stable_hash(data: bytes) -> int:
    """Return a 63-bit hash of `data` that is the same in all processes."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big") >> 1


def scored_pairs(
    predictions: Sequence[Prediction], samples: Sequence[Sample]
) -> Iterator[tuple[Prediction, Sample, tuple[Object, ...]]]:
    """Yield each prediction with its sample and objects, if the sample is annotated and has an image.

    Raises:
        ValueError: The lists do not belong together.
    """
    if [prediction.id for prediction in predictions] != [sample.id for sample in samples]:
        raise ValueError(
            f"{len(predictions)} predictions do not belong to {len(samples)} samples: "
            "pass one prediction per sample, with the sample's id, in the same order"
        )
    for prediction, sample in zip(predictions, samples, strict=True):
        if sample.objects is not None and sample.width > 0:
            yield prediction, sample, sample.objects


def split_crowds(objects: Sequence[Object]) -> tuple[list[Object], Tensor]:
    """Return the objects that are not crowd regions, and the crowd regions' boxes (C, 4)."""
    return [item for item in objects if not item.iscrowd], boxes_of([item for item in objects if item.iscrowd])


def is_unsure(found: Sequence[DetectedObject], sample: Sample) -> Tensor:
    """Return (N,) which detections are ignored if they find no object: LVIS's federated rule, by captions.

    Their caption is none of those that the image was searched for, or one of which not all objects are annotated.
    """
    if sample.searched is None:
        return torch.zeros(len(found), dtype=torch.bool)
    searched = {normalized_caption(item.caption) for item in sample.objects or ()}
    searched |= set(map(normalized_caption, sample.searched.absent))
    searched -= set(map(normalized_caption, sample.searched.incomplete))
    return torch.tensor([normalized_caption(item.caption) not in searched for item in found], dtype=torch.bool)


def normalized_caption(caption: str) -> str:
    """Return the form in which captions are compared: no outer blanks, no case."""
    return caption.strip().casefold()


def boxes_of(objects: Sequence[Object] | Sequence[DetectedObject]) -> Tensor:
    """Return (T, 4) float64 xyxy."""
    return torch.from_numpy(np.array([item.box for item in objects], dtype=np.float64).reshape(-1, 4))


def match_by_score(iou: Tensor, threshold: float) -> list[tuple[int, int]]:
    """Assign each detection, in the order of the rows, the free truth that it overlaps most, at least `threshold`.

    `iou` is (detections by falling score, truths).
    """
    if not iou.numel():
        return []
    free = iou.numpy().copy()
    pairs = []
    # Most detections overlap no truth enough, taken or free.
    for detection in np.flatnonzero(free.max(1) >= threshold).tolist():
        truth = int(free[detection].argmax())
        if free[detection, truth] >= threshold:
            pairs.append((detection, truth))
            free[:, truth] = -1.0
    return pairs


def found_truths(
    found: Sequence[DetectedObject], objects: Sequence[Object], threshold: float, unsure: Tensor | None = None
) -> list[int]:
    """Return which truth each detection finds, as COCO matches: its position, `FALSE`, or `IGNORED`.

    Best scores first, each takes the free truth that it overlaps most, so lower scores never change the matches of
    higher ones. `found` is by falling score; an IoU of `threshold` is a match. Ignored are detections without a truth
    in a crowd region, and those that are `unsure`, see `is_unsure`.
    """
    boxes = boxes_of(found)
    wanted = [index for index, item in enumerate(objects) if not item.iscrowd]
    truths, crowds = split_crowds(objects)
    is_ignored = inside_crowd(boxes, crowds, threshold)
    is_ignored = is_ignored if unsure is None else is_ignored | unsure
    places = [IGNORED if ignored else FALSE for ignored in is_ignored.tolist()]
    for detection, truth in match_by_score(box_iou(boxes, boxes_of(truths)), threshold):
        places[detection] = wanted[truth]
    return places


def match_by_overlap(iou: Tensor, threshold: float) -> list[tuple[int, int]]:
    """Pair the rows (detections) and columns (truths) of `iou`, which have no order, for the largest total overlap.

    An IoU of `threshold` is a pair, 0 is none.
    """
    allowed = torch.where(iou >= threshold, iou, 0.0)
    rows, columns = linear_sum_assignment(allowed.numpy(), maximize=True)
    return [(int(row), int(column)) for row, column in zip(rows, columns, strict=True) if allowed[row, column] > 0]


def inside_crowd(boxes: Tensor, crowds: Tensor, threshold: float) -> Tensor:
    """Return which of (N, 4) boxes have at least `threshold` of their area in one of (C, 4) crowd regions."""
    if not len(crowds):
        return torch.zeros(len(boxes), dtype=torch.bool)
    low, high = torch.maximum(boxes[:, None, :2], crowds[:, :2]), torch.minimum(boxes[:, None, 2:], crowds[:, 2:])
    intersection = (high - low).clamp(min=0).prod(2)  # (N, C)
    return ((intersection > 0) & (intersection >= threshold * box_area(boxes)[:, None])).any(1)
