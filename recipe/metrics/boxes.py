"""Score boxes: COCO average precision, what the queries could find, referring expressions, boxes written in answers."""

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou

from recipe.boxes import asks_for_boxes
from recipe.metrics.gather import (
    UNDEFINED,
    boxes_of,
    inside_crowd,
    is_unsure,
    match_by_overlap,
    normalized_caption,
    scored_pairs,
    split_crowds,
)
from recipe.schema import DetectedObject, Prediction, Sample

# Of each value of COCO's summary: its table, IoU (None: mean of .50:.95), size of objects, boxes per image.
_COCO_VALUES: dict[str, tuple[str, float | None, str, int]] = {
    "ap": ("precision", None, "all", 100), "ap50": ("precision", 0.5, "all", 100),
    "ap75": ("precision", 0.75, "all", 100), "ap_small": ("precision", None, "small", 100),
    "ap_medium": ("precision", None, "medium", 100), "ap_large": ("precision", None, "large", 100),
    "ar1": ("recall", None, "all", 1), "ar10": ("recall", None, "all", 10), "ar100": ("recall", None, "all", 100),
}  # fmt: skip

_SURE, _UNSURE = "sure", "unsure"  # the two categories of boxes without categories


def box_average_precision(predictions: Sequence[Prediction], samples: Sequence[Sample]) -> dict[str, float]:
    """Compute COCO's average precision and recall, ignoring captions.

    Images without objects or without predictions count; crowd regions are ignored as in COCO. If an image is not
    searched for everything (`Sample.searched`), a detection that finds no object is false only if its caption names
    something that was searched for, in full; otherwise it is ignored. Its box finds an object whatever its caption.

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
    ground truth do not count. With `Sample.searched` this is LVIS's federated rule.
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
    coco, numbers = _coco(predictions, samples, by_category=True)
    if coco is None:
        return {}
    # (IoU, recall, category, area, detections): of all areas, the 100 best.
    precision, recall = coco.eval["precision"][..., 0, -1], coco.eval["recall"][..., 0, -1]
    places = {name: numbers[name] - 1 for name in truths}
    return {
        name: CategoryScores(
            count,
            float(precision[:, :, places[name]].mean()),
            float(precision[0, :, places[name]].mean()),
            float(recall[0, places[name]]),
        )
        for name, count in truths.most_common()
    }


def _coco_summary(prefix: str, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> dict[str, float]:
    """Return COCO's summary, of `box` without regard to captions, of `category` by them."""
    coco, _ = _coco(predictions, samples, by_category=prefix == "category")
    summary = {f"{prefix}_{name}": UNDEFINED for name in _COCO_VALUES}
    if coco is None:
        return summary
    for name, (table, iou, size, most) in _COCO_VALUES.items():
        values = coco.eval[table][..., coco.params.areaRngLbl.index(size), coco.params.maxDets.index(most)]
        values = values if iou is None else values[np.isclose(coco.params.iouThrs, iou)]
        defined = values[values > -1]
        summary[f"{prefix}_{name}"] = float(defined.mean()) if defined.size else UNDEFINED
    return summary


@contextmanager
def _without_collection() -> Iterator[None]:
    """Disable the search for cycles, which would go through all rows of an evaluation again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_collection()
def _coco(
    predictions: Sequence[Prediction], samples: Sequence[Sample], by_category: bool
) -> tuple[COCOeval_faster | None, dict[str, int]]:
    """Return COCO's evaluation of all images, None without truths, and the number of each category, from 1.

    Without categories there are two, of which the second holds the detections of `is_unsure`.
    """
    images: list[dict[str, Any]] = []
    truths: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    for prediction, sample, objects in scored_pairs(predictions, samples):
        found = [one for item in prediction.objects for one in (item.per_class() if by_category else [item])]
        ignored: set[int] = set()
        image = len(images)
        images.append({"id": image, "not_exhaustive_category_ids": ignored})
        unsure = [False] * len(objects) + is_unsure(found, sample).tolist()
        for item, is_ignored in zip([*objects, *found], unsure, strict=True):
            name = normalized_caption(item.caption) if by_category else _UNSURE if is_ignored else _SURE
            if not name:
                continue
            category = numbers.setdefault(name, len(numbers) + 1)
            if is_ignored:
                ignored.add(category)
            x1, y1, x2, y2 = item.box
            width, height = x2 - x1, y2 - y1
            row = {"image_id": image, "category_id": category, "bbox": [x1, y1, width, height]}
            if isinstance(item, DetectedObject):
                detections.append(row)
                row["score"], row["iscrowd"], row["area"] = item.score, 0, width * height
                row["id"] = len(detections)  # 0 would be read as "not matched"
            else:
                truths.append(row)
                row["iscrowd"], row["area"], row["id"] = int(item.iscrowd), item.area or width * height, len(truths)
    if not truths:
        return None, numbers
    categories = [{"id": number, "name": name, "frequency": "f"} for name, number in numbers.items()]
    is_federated = any(image["not_exhaustive_category_ids"] for image in images)  # LVIS's rule costs time
    for image in images:
        image["neg_category_ids"] = range(1, len(categories) + 1)  # else LVIS's rule drops detections
    truth, result = (
        COCO({"images": images, "annotations": rows, "categories": categories}) for rows in (truths, detections)
    )  # without `loadRes`, which makes a polygon of each box
    coco = COCOeval_faster(truth, result, "bbox", print_function=lambda *args: None, lvis_style=is_federated)
    coco.params.useCats = int(by_category)
    coco.evaluate()
    coco.accumulate()
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
    boxes. A sample without an answer, or whose chat asks for something else, does not count. A box in a crowd region,
    or of `is_unsure`, is not a false positive.

    Returns:
        `text_f1`, `text_f1_95`: over the boxes of all images at an IoU of at least .5 and .95.
        `text_miou`: over ground truths, the mean IoU of the box each is paired with, 0 if none.
        `text_parse_failure_rate`. A value is -1 if there is nothing to count.
        `text_answers`: how many answers count.
    """
    answers, failures, num_truths, total_iou = 0, 0, 0, 0.0
    hits, boxes = {0.5: 0, 0.95: 0}, {0.5: 0, 0.95: 0}  # by least IoU
    for prediction, sample, objects in scored_pairs(predictions, samples):
        if prediction.answer is None or not asks_for_boxes(sample):
            continue
        found = boxes_of(prediction.answer_objects or ())
        unsure = is_unsure(prediction.answer_objects or (), sample)
        truths, crowds = split_crowds(objects)
        iou = box_iou(found, boxes_of(truths))
        for threshold in hits:
            pairs = match_by_overlap(iou, threshold)
            counted = ~(inside_crowd(found, crowds, threshold) | unsure)
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
        "text_answers": float(answers),
    }
