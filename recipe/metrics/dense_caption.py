"""Are the captions of the boxes that were found right?"""

import torch
from torch import Tensor
from torchvision.ops import box_iou

from recipe.metrics.samples import (
    UNDEFINED,
    PerSampleMetric,
    boxes_of,
    match_by_score,
    normalized_caption,
    sample_key,
    scored_pairs,
)
from recipe.schema import Prediction, Sample


class CaptionMatch(PerSampleMetric):
    """Exact match of captions on matched boxes.

    Predictions from `score_threshold` up are matched by falling score, each to the free ground truth it overlaps
    most, at an IoU of at least `iou_threshold`; crowd regions take no part.

    `compute` returns `caption_match`, the share of matched pairs with equal captions (without case and outer blanks),
    `matched_boxes`, how many pairs those are, and `recall`, the share of ground truths that were matched. Without a
    matched pair `caption_match` is 0; without ground truth it and `recall` are -1.
    """

    def __init__(self, score_threshold: float, iou_threshold: float = 0.5):
        super().__init__()
        self.score_threshold = score_threshold
        self.iou_threshold = iou_threshold

    def update(self, predictions: list[Prediction], samples: list[Sample]) -> None:
        """Adds images.

        Raises:
            ValueError: The predictions do not belong to the samples.
        """
        keys, rows = [], []
        for prediction, sample, objects in scored_pairs(predictions, samples):
            kept = [item for item in prediction.objects if item.score >= self.score_threshold]
            kept.sort(key=lambda item: -item.score)
            truths = [item for item in objects if not item.iscrowd]
            pairs = match_by_score(box_iou(boxes_of(kept), boxes_of(truths)), self.iou_threshold)
            equal = sum(
                normalized_caption(kept[row].caption) == normalized_caption(truths[column].caption)
                for row, column in pairs
            )
            keys.append(sample_key(sample))
            rows.append([equal, len(pairs), len(truths)])
        self.append(keys, rows, width=3)

    def compute(self) -> dict[str, Tensor]:
        """The scores, over all ranks."""
        equal, matched, truths = self.totals()
        return {
            "caption_match": torch.tensor(equal / max(matched, 1) if truths else UNDEFINED),
            "matched_boxes": torch.tensor(matched),
            "recall": torch.tensor(matched / truths if truths else UNDEFINED),
        }
