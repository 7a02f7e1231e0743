"""Are the captions of the boxes that were found right?"""

import torch
from torch import Tensor
from torchvision.ops import box_iou

from recipe.metrics.samples import (
    UNDEFINED,
    SumMetric,
    boxes_of,
    match_by_score,
    normalized_caption,
    scored_pairs,
)
from recipe.metrics.text_scorers import TextScorer
from recipe.schema import Prediction, Sample


class CaptionMatch(SumMetric):
    """Exact match of captions on matched boxes.

    Predictions from `score_threshold` up are matched by falling score, each to the free ground truth it overlaps
    most, at an IoU of at least `iou_threshold`; crowd regions take no part.

    `compute` returns `caption_match`, the share of matched pairs with equal captions (without case and outer blanks),
    `caption_{scorer's name}`, the mean score of the pairs' captions, `matched_boxes`, how many pairs there are, and
    `recall`, the share of ground truths that were matched. Without a matched pair the first two are 0; without ground
    truth they and `recall` are -1.
    """

    def __init__(self, score_threshold: float, scorer: TextScorer, iou_threshold: float = 0.5):
        super().__init__(width=4)  # equal, alike, pairs, truths
        self.score_threshold = score_threshold
        self.scorer = scorer
        self.iou_threshold = iou_threshold

    @property
    def names(self) -> tuple[str, ...]:
        """What `compute` returns."""
        return "caption_match", f"caption_{self.scorer.name}", "matched_boxes", "recall"

    def update(self, predictions: list[Prediction], samples: list[Sample]) -> None:
        """Adds images.

        Raises:
            ValueError: The predictions do not belong to the samples.
        """
        rows = []
        for prediction, _, objects in scored_pairs(predictions, samples):
            kept = [item for item in prediction.objects if item.score >= self.score_threshold]
            kept.sort(key=lambda item: -item.score)
            truths = [item for item in objects if not item.iscrowd]
            pairs = match_by_score(box_iou(boxes_of(kept), boxes_of(truths)), self.iou_threshold)
            candidates = [kept[row].caption for row, _ in pairs]
            references = [truths[column].caption for _, column in pairs]
            equal = sum(
                normalized_caption(candidate) == normalized_caption(reference)
                for candidate, reference in zip(candidates, references, strict=True)
            )
            alike = sum(self.scorer(candidates, [[reference] for reference in references]))
            rows.append([equal, alike, len(pairs), len(truths)])
        self.add(rows)

    def compute(self) -> dict[str, Tensor]:
        """The scores, over all ranks."""
        equal, alike, matched, truths = self.totals()
        match, likeness = ((total / max(matched, 1) if truths else UNDEFINED) for total in (equal, alike))
        values = (match, likeness, matched, matched / truths if truths else UNDEFINED)
        return {name: torch.tensor(value) for name, value in zip(self.names, values, strict=True)}
