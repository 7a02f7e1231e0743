"""Boxes against the truth: COCO average precision, what the queries could find, referring expressions."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from recipe.metrics.gather import (
    UNDEFINED,
    SumMetric,
    asks_for_boxes,
    boxes_of,
    joined,
    normalized_caption,
    sample_key,
    scored_pairs,
    stable_hash,
)
from recipe.schema import DetectedObject, Object, Prediction, Sample

# COCO's own. torchmetrics' defaults are these rounded to float32, which shifts AP: .5035 for .5046 on COCO's reference.
_IOU_THRESHOLDS: list[float] = np.linspace(0.5, 0.95, 10).tolist()
_RECALL_THRESHOLDS: list[float] = np.linspace(0.0, 1.0, 101).tolist()
# Our names of COCO's summary: torchmetrics' keys.
_COCO_NAMES = {
    "ap": "map", "ap50": "map_50", "ap75": "map_75", "ap_small": "map_small", "ap_medium": "map_medium",
    "ap_large": "map_large", "ar1": "mar_1", "ar10": "mar_10", "ar100": "mar_100",
}  # fmt: skip


class BoxAveragePrecision(Metric):
    """Average precision and recall without regard to captions.

    `compute` returns `box_ap` (mean over IoU .50:.95), `box_ap50`, `box_ap75`, `box_ap_small`, `box_ap_medium`,
    `box_ap_large` (32² and 96² pixels apart, by `Object.area` where given), and the average recalls `box_ar1`,
    `box_ar10` and `box_ar100` with so many boxes an image at most; AP takes the 100 best. A value is -1 where no
    ground truth defines it, 0 where there is ground truth and no prediction.

    Images without objects or without predictions count, and crowd regions are ignored as COCO does.
    """

    full_state_update = False
    prefix = "box"

    images: list[Tensor]
    detections: list[Tensor]
    detection_labels: list[Tensor]
    truths: list[Tensor]
    truth_labels: list[Tensor]

    def __init__(self):
        # Kept per rank as a few long tensors: torchmetrics' own metric gathers image by image, which never returns
        # when ranks hold unequally many.
        super().__init__()
        self.add_state("images", default=[], dist_reduce_fx="cat")  # (n, 3): key, detections, truths
        self.add_state("detections", default=[], dist_reduce_fx="cat")  # (d, 5): xyxy, score
        self.add_state("detection_labels", default=[], dist_reduce_fx="cat")
        self.add_state("truths", default=[], dist_reduce_fx="cat")  # (t, 6): xyxy, iscrowd, area
        self.add_state("truth_labels", default=[], dist_reduce_fx="cat")

    @property
    def names(self) -> tuple[str, ...]:
        """What `compute` returns."""
        return tuple(f"{self.prefix}_{name}" for name in _COCO_NAMES)

    def labelled(
        self, detections: Sequence[DetectedObject], truths: Sequence[Object]
    ) -> tuple[list[tuple[DetectedObject, int]], list[tuple[Object, int]]]:
        """What is scored of one image, with its class."""
        return [(item, 0) for item in detections], [(item, 0) for item in truths]

    def update(self, predictions: list[Prediction], samples: list[Sample]) -> None:
        """Adds images.

        Raises:
            ValueError: The predictions do not belong to the samples.
        """
        images, detections, detection_labels, truths, truth_labels = [], [], [], [], []
        for prediction, sample, objects in scored_pairs(predictions, samples):
            found, wanted = self.labelled(prediction.objects, objects)
            images.append([sample_key(sample), len(found), len(wanted)])
            detections += [[*item.box, item.score] for item, _ in found]
            detection_labels += [label for _, label in found]
            # torchmetrics takes an area of 0 as not given and uses the box's
            truths += [[*item.box, float(item.iscrowd), item.area or 0.0] for item, _ in wanted]
            truth_labels += [label for _, label in wanted]
        self.images.append(torch.tensor(images, dtype=torch.int64, device=self.device).reshape(-1, 3))
        self.detections.append(torch.tensor(detections, dtype=torch.float64, device=self.device).reshape(-1, 5))
        self.detection_labels.append(torch.tensor(detection_labels, dtype=torch.int64, device=self.device))
        self.truths.append(torch.tensor(truths, dtype=torch.float64, device=self.device).reshape(-1, 6))
        self.truth_labels.append(torch.tensor(truth_labels, dtype=torch.int64, device=self.device))

    def evaluate(self) -> dict[str, Tensor]:
        """COCO's summary over all ranks, by torchmetrics' names."""
        images = joined(self.images)
        labels = torch.cat([joined(self.detection_labels), joined(self.truth_labels)]).unique()
        detections = _by_image(images[:, 1], self.detections, self.detection_labels, labels)
        truths = _by_image(images[:, 2], self.truths, self.truth_labels, labels)
        coco = MeanAveragePrecision(
            iou_thresholds=_IOU_THRESHOLDS,
            rec_thresholds=_RECALL_THRESHOLDS,
            backend="faster_coco_eval",
            sync_on_compute=False,
        )
        coco.warn_on_many_detections = False  # that the 100 best of an image count is meant
        for index in images[:, 0].argsort(stable=True).tolist():
            found, found_labels = detections[index]
            wanted, wanted_labels = truths[index]
            coco.update(
                [{"boxes": found[:, :4], "scores": found[:, 4], "labels": found_labels}],
                [
                    {
                        "boxes": wanted[:, :4],
                        "labels": wanted_labels,
                        "iscrowd": wanted[:, 4].long(),
                        "area": wanted[:, 5],
                    }
                ],
            )
        return coco.compute()

    def compute(self) -> dict[str, Tensor]:
        """The scores, over all ranks."""
        scores = self.evaluate()
        return {name: scores[key] for name, key in zip(self.names, _COCO_NAMES.values(), strict=True)}


class CategoryAveragePrecision(BoxAveragePrecision):
    """Average precision a category, averaged over categories, where captions are category names.

    `compute` returns `category_ap` and so on, as `BoxAveragePrecision` does. Captions are compared without case and
    outer blanks. Objects without a caption, which were not generated, are left out; categories that no ground truth
    has do not count.
    """

    prefix = "category"

    def labelled(
        self, detections: Sequence[DetectedObject], truths: Sequence[Object]
    ) -> tuple[list[tuple[DetectedObject, int]], list[tuple[Object, int]]]:
        """What is scored of one image, with a hash of its caption: ranks agree on it without talking."""
        found = [(item, _label(item.caption)) for item in detections if item.caption]
        return found, [(item, _label(item.caption)) for item in truths if item.caption]


def _label(caption: str) -> int:
    return stable_hash(normalized_caption(caption).encode())


def _by_image(
    counts: Tensor, rows: list[Tensor], row_labels: list[Tensor], labels: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Each image's rows, and of each row which of the sorted `labels` it has."""
    sizes = counts.tolist()
    classes = torch.searchsorted(labels, joined(row_labels))
    return list(zip(joined(rows).split(sizes), classes.split(sizes), strict=True))


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
