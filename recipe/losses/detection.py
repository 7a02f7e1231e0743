"""The head's loss terms, unweighted and named; each divided by the whole global batch's count, see `LossCounts`.

    loss_bbox         L1 of matched cxcywh boxes                      / objects
    loss_giou         1 - GIoU of matched boxes                       / objects
    loss_objectness   focal loss, summed over the queries of an image / images
    loss_caption      mean cross-entropy over the tokens of an image's matched captions / images

`*_aux` are the same terms summed over the earlier layers, `*_dn` over all layers of the denoising queries.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from recipe.losses.matcher import Matches
from recipe.schema import DetectionOutputs, LossCounts, Target


class DenoisingTargets(Protocol):
    """What the losses read of `recipe.models.denoising.DenoisingQueries`, R = groups * 2 * T queries an image.

    Attributes:
        target_boxes: (N, R, 4) cxcywh.
        valid: (N, R) bool, False at padding.
        positive: (N, R) bool, True where the query is to become its target, False where it is to be rejected.
        num_groups: Copies of the ground truth.
    """

    target_boxes: Tensor
    valid: Tensor
    positive: Tensor
    num_groups: int


def detection_losses(
    outputs: DetectionOutputs,
    matches: Sequence[Matches],
    targets: Sequence[Target | None],
    counts: LossCounts,
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
) -> dict[str, Tensor]:
    """Box and objectness terms of the object queries.

    Args:
        outputs: Of N images.
        matches: One a layer, the last layer's last.
        targets: N of them; images without (not annotated) take no part.
        counts: Denominators.
        focal_alpha: Weight of objects against empty queries.
        focal_gamma: Focusing power.

    Returns:
        `loss_bbox loss_giou loss_objectness`, and the same with `_aux` where there are earlier layers.
    """
    annotated = torch.tensor([target is not None for target in targets], device=outputs.pred_boxes.device)
    boxes = _padded_boxes(targets, outputs.pred_boxes)
    layers = [*outputs.aux_outputs, outputs]
    terms = []
    for layer, match in zip(layers, matches, strict=True):
        is_object = torch.zeros_like(layer.pred_objectness)
        is_object[match.image, match.query] = 1.0
        predicted, true = layer.pred_boxes[match.image, match.query], boxes[match.image, match.target]
        terms.append(
            {
                **box_losses(predicted, true, counts["objects"]),
                "loss_objectness": _focal(
                    layer.pred_objectness[annotated], is_object[annotated], focal_alpha, focal_gamma
                )
                / max(counts["images"], 1),
            }
        )
    last = terms.pop()
    return {**last, **_summed(terms, "_aux")}


def denoising_losses(
    denoising: tuple[DenoisingTargets, DetectionOutputs] | None,
    detection: DetectionOutputs,
    counts: LossCounts,
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
) -> dict[str, Tensor]:
    """Box and objectness terms of the denoising queries, which know their targets, over all layers.

    Args:
        denoising: The queries and their outputs; None where no image of the batch has an object: all terms are 0.
        detection: Of the object queries.
        counts: Denominators; each group counts as a batch of its own.
        focal_alpha: Weight of objects against empty queries.
        focal_gamma: Focusing power.

    Returns:
        `loss_bbox_dn loss_giou_dn loss_objectness_dn`.
    """
    if denoising is None:
        zero = 0.0 * detection.pred_boxes.sum()
        return {"loss_bbox_dn": zero, "loss_giou_dn": zero, "loss_objectness_dn": zero}
    queries, outputs = denoising
    valid, mended = queries.valid, queries.valid & queries.positive
    terms = []
    for layer in [*outputs.aux_outputs, outputs]:
        logits = layer.pred_objectness[valid]
        focal = _focal(logits, queries.positive[valid].to(logits), focal_alpha, focal_gamma)
        true = queries.target_boxes[mended].to(layer.pred_boxes)
        terms.append(
            {
                **box_losses(layer.pred_boxes[mended], true, counts["objects"] * queries.num_groups),
                "loss_objectness": focal / (max(counts["images"], 1) * queries.num_groups),
            }
        )
    return _summed(terms, "_dn")


def box_losses(predicted: Tensor, true: Tensor, num_objects: float) -> dict[str, Tensor]:
    """L1 and GIoU of n pairs of boxes, (n, 4) cxcywh each, summed and divided by `num_objects`."""
    l1 = (predicted - true).abs().sum()
    giou = generalized_box_iou_loss(
        box_convert(predicted, "cxcywh", "xyxy"), box_convert(true, "cxcywh", "xyxy"), reduction="sum"
    )
    return {"loss_bbox": l1 / max(num_objects, 1), "loss_giou": giou / max(num_objects, 1)}


def caption_loss(logits: Tensor, labels: Tensor, images: Tensor, num_images: int, counts: LossCounts) -> Tensor:
    """Mean cross-entropy over each image's caption tokens, summed over images, divided by the batch's images.

    Args:
        logits: (k, V), of the tokens of all matched captions.
        labels: (k,) int64.
        images: (k,) int64, the image of each token, in [0, num_images).
        num_images: N.
        counts: Denominators.
    """
    nll = F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels, reduction="none")
    sums = nll.new_zeros(num_images).index_add(0, images, nll)
    tokens = torch.bincount(images, minlength=num_images).clamp(min=1)
    return (sums / tokens).sum() / max(counts["images"], 1)


def _focal(logits: Tensor, is_object: Tensor, alpha: float, gamma: float) -> Tensor:
    return sigmoid_focal_loss(logits, is_object, alpha=alpha, gamma=gamma, reduction="sum")


def _padded_boxes(targets: Sequence[Target | None], like: Tensor) -> Tensor:
    """(N, T, 4), zero where padded."""
    rows = [like.new_zeros(0, 4) if target is None else target["boxes"].to(like) for target in targets]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _summed(terms: Sequence[dict[str, Tensor]], suffix: str) -> dict[str, Tensor]:
    if not terms:
        return {}
    return {name + suffix: torch.stack([term[name] for term in terms]).sum() for name in terms[0]}
