"""The loss terms of the proposals: one peak per object, and boxes learned from the cells around it.

    loss_objectness_proposals   penalty-reduced focal loss of every cell, summed    / objects
    loss_bbox_proposals         L1, of each object the weighted mean over its cells / objects
    loss_giou_proposals         1 - GIoU, likewise                                  / objects

The target of a cell is a Gaussian around each object's centre, of a width in proportion to the box (CenterNet, Zhou et
al. 2019; TTFNet, Liu et al. 2020): 1 in the cell of the centre, less in its neighbours, which are punished less.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from recipe.losses.terms import box_losses
from recipe.schema import LossCounts, Proposals, Target

SPREAD = 0.54 / 6  # standard deviation of the Gaussian, of the box's side (TTFNet, section 3.2)
LEAST_SPREAD = 0.35  # of a cell's side, so that a small object has neighbours too
LEAST_WEIGHT = 0.05  # of a cell that learns a box
FOCUS, RELIEF = 2.0, 4.0  # exponents of CenterNet's focal loss


def proposal_losses(
    proposals: Proposals, targets: Sequence[Target | None], counts: LossCounts
) -> dict[str, Float[Tensor, ""]]:
    """Return the three terms of N images; an image that is not annotated (None) takes no part."""
    logits = proposals.pred_objectness.to(torch.promote_types(proposals.pred_objectness.dtype, torch.float32))
    nothing = logits[:0].sum() + proposals.pred_boxes[:0].sum()  # so that every parameter has a gradient
    sums: dict[str, Tensor] = {"loss_objectness": nothing, "loss_bbox": nothing, "loss_giou": nothing}
    for image, target in enumerate(targets):
        if target is None:
            continue
        cells, boxes = proposals.cells[image], target["boxes"].to(proposals.cells)
        peak, owner = cell_targets(cells, boxes)
        of_cells = torch.where(cells[:, 2] > 0, objectness_loss(logits[image], peak), 0.0)
        sums["loss_objectness"] = sums["loss_objectness"] + of_cells.sum()
        if not len(boxes):
            continue
        weights = torch.where(peak > LEAST_WEIGHT, peak, 0.0)
        of_object = weights.new_zeros(len(boxes)).index_add(0, owner, weights)
        weights = weights / of_object.clamp(min=LEAST_WEIGHT)[owner]
        for name, loss in box_losses(proposals.pred_boxes[image], boxes[owner]).items():
            sums[name] = sums[name] + (weights * loss).sum()
    return {f"{name}_proposals": total / max(counts["objects"], 1) for name, total in sums.items()}


def cell_targets(
    cells: Float[Tensor, "P 4"], boxes: Float[Tensor, "T 4"]
) -> tuple[Float[Tensor, " P"], Int64[Tensor, " P"]]:
    """Return what each cell's objectness should be, and the object it is nearest to; all cxcywh in [0, 1]."""
    if not len(boxes):
        return cells.new_zeros(len(cells)), torch.zeros(len(cells), dtype=torch.int64, device=cells.device)
    side = cells[:, 2:].amax(0)  # all are equal, but 0 at padding
    offsets = cells[:, None, :2] - boxes[:, :2]  # (P, T, 2)
    spread = (SPREAD * boxes[:, 2:]).maximum(LEAST_SPREAD * side)
    peaks = (offsets / spread).square().sum(-1).mul(-0.5).exp()
    apart = torch.where(cells[:, None, 2] > 0, (offsets / side).square().sum(-1), torch.inf)
    peaks[apart.argmin(0), torch.arange(len(boxes), device=cells.device)] = 1.0
    peak, owner = torch.where(cells[:, None, 2] > 0, peaks, 0.0).max(dim=1)
    return peak, owner


def objectness_loss(logits: Float[Tensor, " P"], peak: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Return CenterNet's focal loss (equation 1) of each cell."""
    probability = logits.sigmoid()
    at_peak = (1 - probability) ** FOCUS * F.softplus(-logits)
    elsewhere = (1 - peak) ** RELIEF * probability**FOCUS * F.softplus(logits)
    return torch.where(peak == 1, at_peak, elsewhere)
