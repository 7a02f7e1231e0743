"""How good are the boxes that the language model writes in its answer?"""

import torch
from torch import Tensor
from torchvision.ops import box_iou

from recipe.metrics.samples import (
    UNDEFINED,
    PerSampleMetric,
    boxes_of,
    inside_crowd,
    match_by_overlap,
    sample_key,
    scored_pairs,
)
from recipe.schema import Prediction, Sample


class AnswerBoxes(PerSampleMetric):
    """Boxes parsed from the answer against the ground truth, without regard to captions.

    Boxes and truths are paired one to one for the largest total overlap. `compute` returns `text_f1`, over the boxes
    of all images at an IoU of at least `iou_threshold`; `text_miou`, over ground truths the mean IoU of the box each
    is paired with, 0 where none; and `text_parse_failure_rate`. An answer that does not parse counts as no boxes, a
    sample without an answer does not count. A box in a crowd region is no false positive. Values without anything to
    count are -1.
    """

    def __init__(self, iou_threshold: float = 0.5):
        super().__init__()
        self.iou_threshold = iou_threshold

    def update(self, predictions: list[Prediction], samples: list[Sample]) -> None:
        """Adds answers.

        Raises:
            ValueError: The predictions do not belong to the samples.
        """
        keys, rows = [], []
        for prediction, sample, objects in scored_pairs(predictions, samples):
            if prediction.answer is None:
                continue
            boxes = boxes_of(prediction.answer_objects or ())
            truths = boxes_of([item for item in objects if not item.iscrowd])
            crowds = boxes_of([item for item in objects if item.iscrowd])
            iou = box_iou(boxes, truths)
            counted = ~inside_crowd(boxes, crowds, self.iou_threshold)
            hits = match_by_overlap(iou, self.iou_threshold)
            counted[[row for row, _ in hits]] = True
            total_iou = sum(float(iou[pair]) for pair in match_by_overlap(iou, 0.0))
            keys.append(sample_key(sample))
            failed = prediction.answer_objects is None
            rows.append([1, failed, len(hits), int(counted.sum()), len(truths), total_iou])
        self.append(keys, rows, width=6)

    def compute(self) -> dict[str, Tensor]:
        """The scores, over all ranks."""
        answers, failures, hits, boxes, truths, total_iou = self.totals()
        return {
            "text_f1": torch.tensor(2 * hits / (boxes + truths) if boxes + truths else UNDEFINED),
            "text_miou": torch.tensor(total_iou / truths if truths else UNDEFINED),
            "text_parse_failure_rate": torch.tensor(failures / answers if answers else UNDEFINED),
        }
