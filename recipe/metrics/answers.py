"""How good are the boxes that the language model writes in its answer?"""

import torch
from torch import Tensor
from torchvision.ops import box_iou

from recipe.metrics.gather import (
    UNDEFINED,
    SumMetric,
    asks_for_boxes,
    boxes_of,
    inside_crowd,
    match_by_overlap,
    scored_pairs,
)
from recipe.schema import Prediction, Sample

F1_THRESHOLDS = (0.5, 0.95)  # IoU


class AnswerBoxes(SumMetric):
    """Boxes parsed from the answer against the ground truth, without regard to captions.

    Boxes and truths are paired one to one for the largest total overlap. `compute` returns `text_f1` and `text_f1_95`,
    over the boxes of all images at an IoU of at least .5 and .95; `text_miou`, over ground truths the mean IoU of the
    box each is paired with, 0 where none; and `text_parse_failure_rate`. An answer that does not parse counts as no
    boxes; a sample without an answer, or whose chat asks for something else, does not count. A box in a crowd region is
    no false positive. Values without anything to count are -1.
    """

    def __init__(self):
        super().__init__(width=4 + 2 * len(F1_THRESHOLDS))

    def update(self, predictions: list[Prediction], samples: list[Sample]) -> None:
        """Adds answers.

        Raises:
            ValueError: The predictions do not belong to the samples.
        """
        rows = []
        for prediction, sample, objects in scored_pairs(predictions, samples):
            if prediction.answer is None or not asks_for_boxes(sample):
                continue
            boxes = boxes_of(prediction.answer_objects or ())
            truths = boxes_of([item for item in objects if not item.iscrowd])
            crowds = boxes_of([item for item in objects if item.iscrowd])
            iou = box_iou(boxes, truths)
            counts = [
                number for threshold in F1_THRESHOLDS for number in _hits_and_boxes(iou, boxes, crowds, threshold)
            ]
            total_iou = sum(float(iou[pair]) for pair in match_by_overlap(iou, 0.0))
            failed = prediction.answer_objects is None
            rows.append([1, failed, len(truths), total_iou, *counts])
        self.add(rows)

    def compute(self) -> dict[str, Tensor]:
        """The scores, over all ranks."""
        answers, failures, truths, total_iou, hits, boxes, hits_95, boxes_95 = self.totals()
        return {
            "text_f1": torch.tensor(2 * hits / (boxes + truths) if boxes + truths else UNDEFINED),
            "text_f1_95": torch.tensor(2 * hits_95 / (boxes_95 + truths) if boxes_95 + truths else UNDEFINED),
            "text_miou": torch.tensor(total_iou / truths if truths else UNDEFINED),
            "text_parse_failure_rate": torch.tensor(failures / answers if answers else UNDEFINED),
        }


def _hits_and_boxes(iou: Tensor, boxes: Tensor, crowds: Tensor, threshold: float) -> tuple[int, int]:
    """How many boxes hit a truth, and how many count at all: those that hit nothing in a crowd do not."""
    hits = match_by_overlap(iou, threshold)
    counted = ~inside_crowd(boxes, crowds, threshold)
    counted[[row for row, _ in hits]] = True
    return len(hits), int(counted.sum())
