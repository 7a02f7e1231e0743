"""Score the boxes that the language model writes in its answer."""

from collections.abc import Sequence

from torch import Tensor
from torchvision.ops import box_iou

from recipe.metrics.gather import (
    UNDEFINED,
    asks_for_boxes,
    boxes_of,
    inside_crowd,
    match_by_overlap,
    scored_pairs,
    split_crowds,
)
from recipe.schema import Prediction, Sample


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
            num_hits, num_boxes = _hits_and_boxes(iou, found, crowds, threshold)
            hits[threshold] += num_hits
            boxes[threshold] += num_boxes
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


def _hits_and_boxes(iou: Tensor, boxes: Tensor, crowds: Tensor, threshold: float) -> tuple[int, int]:
    """Count the boxes that hit a truth, and all boxes except those that only hit a crowd region."""
    hits = match_by_overlap(iou, threshold)
    counted = ~inside_crowd(boxes, crowds, threshold)
    counted[[row for row, _ in hits]] = True
    return len(hits), int(counted.sum())
