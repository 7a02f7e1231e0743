"""Score boxes: COCO average precision, what the queries could find, referring expressions, boxes written in answers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from recipe.metrics.gather import (
    UNDEFINED,
    asks_for_boxes,
    boxes_of,
    inside_crowd,
    match_by_overlap,
    normalized_caption,
    scored_pairs,
    split_crowds,
)
from recipe.schema import DetectedObject, Object, Prediction, Sample

# COCO's own. torchmetrics rounds them to float32, which shifts AP: .5035 instead of .5046 on COCO's reference.
_IOU_THRESHOLDS: list[float] = np.linspace(0.5, 0.95, 10).tolist()
_RECALL_THRESHOLDS: list[float] = np.linspace(0.0, 1.0, 101).tolist()
# Our name of each value of COCO's summary, and torchmetrics' name.
_COCO_NAMES = {
    "ap": "map", "ap50": "map_50", "ap75": "map_75", "ap_small": "map_small", "ap_medium": "map_medium",
    "ap_large": "map_large", "ar1": "mar_1", "ar10": "mar_10", "ar100": "mar_100",
}  # fmt: skip


def box_average_precision(predictions: Sequence[Prediction], samples: Sequence[Sample]) -> dict[str, float]:
    """Compute COCO's average precision and recall, ignoring captions.

    Images without objects or without predictions count; crowd regions are ignored as in COCO.

    Returns:
        `box_ap` (mean over IoU .50:.95), `box_ap50`, `box_ap75`, `box_ap_small`, `box_ap_medium`, `box_ap_large`
        (divided at 32² and 96² pixels, by `Object.area` if given), and the average recalls `box_ar1`, `box_ar10`,
        `box_ar100` of at most N boxes per image. AP uses the 100 best. -1 if no ground truth defines a value, 0
        without predictions.
    """
    return _coco_summary("box", predictions, samples)


def category_average_precision(predictions: Sequence[Prediction], samples: Sequence[Sample]) -> dict[str, float]:
    """Compute `category_ap` and so on: `box_average_precision` averaged over categories.

    Captions are the category names, compared without case and outer blanks. An object with class probabilities counts
    once for each class, its score times the probability. Objects without a caption are left out; categories without
    ground truth do not count.
    """
    return _coco_summary("category", predictions, samples)


@dataclass(frozen=True)
class CategoryScores:
    """The scores of one category, as COCO defines them; -1 without ground truth.

    Attributes:
        truths: Ground truths, without crowd regions.
        ap, ap50: Average precision, mean over IoU .50:.95 and at .50.
        recall: At an IoU of .50, of the 100 best of an image.
    """

    truths: int
    ap: float
    ap50: float
    recall: float


def scores_per_category(predictions: Sequence[Prediction], samples: Sequence[Sample]) -> dict[str, CategoryScores]:
    """Return the scores of each category with ground truth, by falling number of truths; see `CategoryScores`.

    The mean of their `ap` is `category_ap`.
    """
    truths = Counter(
        normalized_caption(item.caption)
        for _, _, objects in scored_pairs(predictions, samples)
        for item in objects
        if not item.iscrowd and normalized_caption(item.caption)
    )
    coco, numbers = _coco(predictions, samples, by_category=True, extended_summary=True)
    if not truths:
        return {}
    summary = coco.compute()
    place = {int(label): index for index, label in enumerate(summary["classes"].reshape(-1).tolist())}
    # (IoU, recall, category, area, detections): of all areas, the 100 best.
    precision, recall = summary["precision"][..., 0, -1], summary["recall"][..., 0, -1]
    return {
        name: CategoryScores(
            count,
            float(precision[:, :, place[numbers[name]]].mean()),
            float(precision[0, :, place[numbers[name]]].mean()),
            float(recall[0, place[numbers[name]]]),
        )
        for name, count in truths.most_common()
    }


def _coco_summary(prefix: str, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> dict[str, float]:
    """Return COCO's summary, of `box` without regard to captions, of `category` by them."""
    coco, _ = _coco(predictions, samples, by_category=prefix == "category")
    summary = coco.compute() if coco.groundtruth_labels else {}
    return {f"{prefix}_{name}": float(summary.get(key, UNDEFINED)) for name, key in _COCO_NAMES.items()}


def _coco(
    predictions: Sequence[Prediction], samples: Sequence[Sample], by_category: bool, extended_summary: bool = False
) -> tuple[MeanAveragePrecision, dict[str, int]]:
    """Return COCO's metric of all images, and the number of each category; without categories all are one."""
    coco = MeanAveragePrecision(
        iou_thresholds=_IOU_THRESHOLDS,
        rec_thresholds=_RECALL_THRESHOLDS,
        backend="faster_coco_eval",
        extended_summary=extended_summary,
        sync_on_compute=False,
    )
    coco.warn_on_many_detections = False  # only the 100 best of an image count
    numbers: dict[str, int] = {}

    def labels_of(objects: Sequence[Object] | Sequence[DetectedObject]) -> Tensor:
        names = [normalized_caption(item.caption) if by_category else "" for item in objects]
        return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names], dtype=torch.int64)

    for prediction, _, wanted in scored_pairs(predictions, samples):
        found = prediction.objects
        if by_category:
            found = [one for item in found for one in item.per_class() if normalized_caption(one.caption)]
            wanted = [item for item in wanted if normalized_caption(item.caption)]
        scores = torch.tensor([item.score for item in found], dtype=torch.float64)
        crowds = torch.tensor([int(item.iscrowd) for item in wanted], dtype=torch.int64)
        areas = torch.tensor([item.area or 0.0 for item in wanted], dtype=torch.float64)  # 0: torchmetrics' "not given"
        coco.update(
            [{"boxes": boxes_of(found), "scores": scores, "labels": labels_of(found)}],
            [{"boxes": boxes_of(wanted), "labels": labels_of(wanted), "iscrowd": crowds, "area": areas}],
        )
    return coco, numbers


def query_recall(
    predictions: Sequence[Prediction], samples: Sequence[Sample], num_queries: int, iou_threshold: float = 0.5
) -> dict[str, float]:
    """Compute how many ground truths the queries reach, whatever their scores.

    The gap between `query_recall50` and `recall` is lost by the scores, not by the boxes.

    Returns:
        `recall_ceiling`: share of ground truths for which there is a query, min(`num_queries`, T) of T per image.
        `query_recall50`: share that the best one-to-one assignment of predicted objects finds at `iou_threshold`.
        Both are -1 without ground truth.
    """
    found, reachable, total = 0, 0, 0
    for prediction, _, objects in scored_pairs(predictions, samples):
        truths, _ = split_crowds(objects)
        is_near = (box_iou(boxes_of(prediction.objects), boxes_of(truths)) >= iou_threshold).numpy()
        found += int(is_near[linear_sum_assignment(is_near, maximize=True)].sum())
        reachable += min(num_queries, len(truths))
        total += len(truths)
    shares = {"recall_ceiling": reachable, "query_recall50": found}
    return {name: value / total if total else UNDEFINED for name, value in shares.items()}


def expression_accuracy(
    predictions: Sequence[Prediction], samples: Sequence[Sample], iou_threshold: float = 0.5
) -> dict[str, float]:
    """Compute RefCOCO's accuracy: is the best-scored box on the one object that an expression names?

    A sample counts if its `messages` hold a user turn that asks for boxes, and it has exactly one object. The
    detection chat, the same for all samples, is not an expression.

    Returns:
        `refcoco_acc`: share whose best-scored box overlaps the object enough; -1 if no sample counts.
        `refcoco_samples`: how many count.
    """
    right, counted = 0, 0
    for prediction, sample, objects in scored_pairs(predictions, samples):
        truths, _ = split_crowds(objects)
        is_asked = any(turn["role"] == "user" for turn in sample.messages or ()) and asks_for_boxes(sample)
        if len(truths) == 1 and is_asked:
            best = sorted(prediction.objects, key=lambda item: -item.score)[:1]
            right += bool((box_iou(boxes_of(best), boxes_of(truths)) >= iou_threshold).any())
            counted += 1
    return {"refcoco_acc": right / counted if counted else UNDEFINED, "refcoco_samples": float(counted)}


def answer_boxes(predictions: Sequence[Prediction], samples: Sequence[Sample]) -> dict[str, float]:
    """Compare boxes parsed from the answers with the ground truth, ignoring captions.

    Boxes and truths are paired one to one for the largest total overlap. An answer that cannot be parsed counts as no
    boxes. A sample without an answer, or whose chat asks for something else, does not count. A box in a crowd region
    is not a false positive.

    Returns:
        `text_f1`, `text_f1_95`: over the boxes of all images at an IoU of at least .5 and .95.
        `text_miou`: over ground truths, the mean IoU of the box each is paired with, 0 if none.
        `text_parse_failure_rate`. A value is -1 if there is nothing to count.
    """
    answers, failures, num_truths, total_iou = 0, 0, 0, 0.0
    hits, boxes = {0.5: 0, 0.95: 0}, {0.5: 0, 0.95: 0}  # by least IoU
    for prediction, sample, objects in scored_pairs(predictions, samples):
        if prediction.answer is None or not asks_for_boxes(sample):
            continue
        found = boxes_of(prediction.answer_objects or ())
        truths, crowds = split_crowds(objects)
        iou = box_iou(found, boxes_of(truths))
        for threshold in hits:
            pairs = match_by_overlap(iou, threshold)
            counted = ~inside_crowd(found, crowds, threshold)
            counted[[row for row, _ in pairs]] = True
            hits[threshold] += len(pairs)
            boxes[threshold] += int(counted.sum())
        total_iou += sum(float(iou[pair]) for pair in match_by_overlap(iou, 0.0))
        answers += 1
        failures += prediction.answer_objects is None
        num_truths += len(truths)
    f1, f1_95 = (
        2 * hits[threshold] / (boxes[threshold] + num_truths) if boxes[threshold] + num_truths else UNDEFINED
        for threshold in hits
    )
    return {
        "text_f1": f1,
        "text_f1_95": f1_95,
        "text_miou": total_iou / num_truths if num_truths else UNDEFINED,
        "text_parse_failure_rate": failures / answers if answers else UNDEFINED,
    }
