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
from torch.nn.utils.rnn import pad_sequence

from recipe.losses.terms import box_losses
from recipe.schema import LossCounts, Proposals, Target

SPREAD = 0.54 / 6  # standard deviation of the Gaussian, of the box's side (TTFNet, section 3.2)
LEAST_SPREAD = 0.35  # of a cell's side, so that a small object has neighbours too
LEAST_WEIGHT = 0.05  # of a cell that learns a box
AT_ONCE = 2**21  # pairs of cells and objects, some 100 MB in float32
FOCUS, RELIEF = 2.0, 4.0  # exponents of CenterNet's focal loss


def proposal_losses(
    proposals: Proposals, targets: Sequence[Target | None], counts: LossCounts
) -> dict[str, Float[Tensor, ""]]:
    """Return the three terms of N images, all computed together; one that is not annotated (None) takes no part."""
    cells = proposals.cells
    logits = proposals.pred_objectness.to(torch.promote_types(proposals.pred_objectness.dtype, torch.float32))
    objects = [cells.new_zeros(0, 4) if target is None else target["boxes"].to(cells) for target in targets]
    annotated = torch.tensor([[target is not None] for target in targets]).to(cells.device, non_blocking=True)
    boxes = pad_sequence(objects, batch_first=True)  # (N, T, 4)
    peak, owner = targets_of_images(cells, objects, boxes)
    counted = (cells[..., 2] > 0) & annotated
    terms = {"loss_objectness": torch.where(counted, objectness_loss(logits, peak), 0.0)}
    weights = torch.where(peak > LEAST_WEIGHT, peak, 0.0)
    if boxes.shape[1]:
        of_object = weights.new_zeros(boxes.shape[:2]).scatter_add(1, owner, weights)
        weights = weights / of_object.clamp(min=LEAST_WEIGHT).gather(1, owner)
        boxes = boxes.gather(1, owner[..., None].expand(-1, -1, 4))  # (N, P, 4)
    else:
        boxes = torch.zeros_like(cells)
    terms |= {name: weights * loss for name, loss in box_losses(proposals.pred_boxes, boxes).items()}
    # Of each image first: what is added does not depend on how many images there are.
    return {f"{name}_proposals": term.sum(1).sum() / max(counts["objects"], 1) for name, term in terms.items()}


def targets_of_images(
    cells: Float[Tensor, "N P 4"], objects: Sequence[Float[Tensor, "_ 4"]], boxes: Float[Tensor, "N T 4"]
) -> tuple[Float[Tensor, "N P"], Int64[Tensor, "N P"]]:
    """Return `cell_targets` of as many images at once as `AT_ONCE` allows; `boxes` are `objects`, padded."""
    numbers = [len(own) for own in objects]
    step = max(1, AT_ONCE // max(1, cells.shape[1] * boxes.shape[1]))
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(numbers), step):
        rows = slice(start, start + step)
        of_rows = torch.tensor(numbers[rows]).to(cells.device, non_blocking=True)
        parts.append(cell_targets(cells[rows], boxes[rows, : max(numbers[rows])], of_rows))
    peaks, owners = zip(*parts, strict=True)
    return torch.cat(peaks), torch.cat(owners)


def cell_targets(
    cells: Float[Tensor, "N P 4"], boxes: Float[Tensor, "N T 4"], numbers: Int64[Tensor, " N"]
) -> tuple[Float[Tensor, "N P"], Int64[Tensor, "N P"]]:
    """Return what each cell's objectness should be, and the object it is nearest to; all cxcywh in [0, 1].

    `numbers` are those of each image's objects, which come first in `boxes`.
    """
    if not boxes.shape[1]:
        return cells.new_zeros(cells.shape[:2]), torch.zeros(cells.shape[:2], dtype=torch.int64, device=cells.device)
    is_cell = cells[..., 2:3] > 0  # (N, P, 1)
    is_object = (torch.arange(boxes.shape[1], device=cells.device) < numbers[:, None])[:, None]  # (N, 1, T)
    side = cells[..., 2:].amax(1)[:, None, None]  # (N, 1, 1, 2): all are equal, but 0 at padding
    offsets = cells[:, :, None, :2] - boxes[:, None, :, :2]  # (N, P, T, 2)
    spread = (SPREAD * boxes[:, None, :, 2:]).maximum(LEAST_SPREAD * side)
    peaks = (offsets / spread).square().sum(-1).mul(-0.5).exp()
    apart = torch.where(is_cell, (offsets / side).square().sum(-1), torch.inf)
    peaks = peaks.scatter(1, apart.argmin(1, keepdim=True), 1.0)
    peak, owner = torch.where(is_cell & is_object, peaks, 0.0).max(dim=2)
    return peak, owner


def objectness_loss(logits: Float[Tensor, " *cells"], peak: Float[Tensor, " *cells"]) -> Float[Tensor, " *cells"]:
    """Return CenterNet's focal loss (equation 1) of each cell."""
    probability = logits.sigmoid()
    at_peak = (1 - probability) ** FOCUS * F.softplus(-logits)
    elsewhere = (1 - peak) ** RELIEF * probability**FOCUS * F.softplus(logits)
    return torch.where(peak == 1, at_peak, elsewhere)
