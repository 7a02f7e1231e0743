"""What the queries could find at best, and whether an expression's one object is found."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou

from recipe.metrics.samples import UNDEFINED, SumMetric, asks_for_boxes, boxes_of, scored_pairs
from recipe.schema import Prediction, Sample


class QueryRecall(SumMetric):
    """How many ground truths the queries reach, whatever their scores.

    `compute` returns `recall_ceiling`, the share of ground truths for which there is a query at all, min(Q, T) of the
    T of each image, and `query_recall50`, the share that some assignment of predicted objects, one each, finds at an
    IoU of at least .5. Every query gives a predicted object, but for those that NMS removes where it is on: so the
    ceiling counts all queries, `query_recall50` those that NMS leaves. What lies between that and `recall` is lost by
    the scores, not by the boxes. Without ground truth both are -1.

    Args:
        num_queries: Q, the head's queries of an image.
        iou_threshold: Least overlap of a query that finds a truth.
    """

    def __init__(self, num_queries: int, iou_threshold: float = 0.5):
        super().__init__(width=3)  # found, reachable, truths
        self.num_queries = num_queries
        self.iou_threshold = iou_threshold

    def update(self, predictions: list[Prediction], samples: list[Sample]) -> None:
        """Adds images.

        Raises:
            ValueError: The predictions do not belong to the samples.
        """
        rows = []
        for prediction, _, objects in scored_pairs(predictions, samples):
            truths = boxes_of([item for item in objects if not item.iscrowd])
            is_near = (box_iou(boxes_of(prediction.objects), truths) >= self.iou_threshold).numpy()
            found = is_near[linear_sum_assignment(is_near, maximize=True)].sum()
            rows.append([found, min(self.num_queries, len(truths)), len(truths)])
        self.add(rows)

    def compute(self) -> dict[str, Tensor]:
        """The scores, over all ranks."""
        found, reachable, truths = self.totals()
        return {
            "recall_ceiling": torch.tensor(reachable / truths if truths else UNDEFINED),
            "query_recall50": torch.tensor(found / truths if truths else UNDEFINED),
        }


class ExpressionAccuracy(SumMetric):
    """RefCOCO's accuracy: is the best-scored box on the one object that an expression names?

    A sample counts where its `messages` ask something (the expression stands in a user turn; the detection chat,
    which is the same for all, is no expression), boxes are asked for and not, say, a colour, and it has exactly one
    object. `compute` returns `refcoco_acc`, the share whose best-scored box overlaps that object at an IoU of at least
    `iou_threshold`, and `refcoco_samples`, how many counted; without any, `refcoco_acc` is -1.
    """

    def __init__(self, iou_threshold: float = 0.5):
        super().__init__(width=2)  # is right, counts
        self.iou_threshold = iou_threshold

    def update(self, predictions: list[Prediction], samples: list[Sample]) -> None:
        """Adds answers.

        Raises:
            ValueError: The predictions do not belong to the samples.
        """
        rows = []
        for prediction, sample, objects in scored_pairs(predictions, samples):
            truths = [item for item in objects if not item.iscrowd]
            is_asked = any(turn["role"] == "user" for turn in sample.messages or ()) and asks_for_boxes(sample)
            if len(truths) != 1 or not is_asked:
                continue
            best = sorted(prediction.objects, key=lambda item: -item.score)[:1]
            is_right = bool((box_iou(boxes_of(best), boxes_of(truths)) >= self.iou_threshold).any())
            rows.append([is_right, 1])
        self.add(rows)

    def compute(self) -> dict[str, Tensor]:
        """The scores, over all ranks."""
        right, counted = self.totals()
        return {
            "refcoco_acc": torch.tensor(right / counted if counted else UNDEFINED),
            "refcoco_samples": torch.tensor(counted),
        }
