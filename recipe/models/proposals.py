"""Proposals: every cell of the finest map proposes one object, as a point with a box (CenterNet, Zhou et al. 2019).

The best ones that are highest among their neighbours become the queries' first reference boxes (two-stage Deformable
DETR; DINO's mixed selection: contents stay learned, and what the cell holds is added). Their loss teaches every
cell, not only the matched queries, so the maps under the head learn from the first step (`recipe/losses/proposals.py`).
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from recipe.boxes import apply_deltas
from recipe.models.layers import objectness_layer
from recipe.models.pyramid import ConvNorm, members_of
from recipe.schema import Memory, Proposals

INITIAL_CELLS = 4.0  # sides of a proposal at first, in cells


class ProposalHead(nn.Module):
    """Box and objectness of each cell, and the choice of the queries' references.

    Args:
        width: W, of the maps.
    """

    def __init__(self, width: int):
        super().__init__()
        narrow = width // 2
        # With one convolution boxes of small objects are less exact (RESULTS.md, "How exactly boxes are placed").
        self.tower = nn.Sequential(ConvNorm(width, narrow), ConvNorm(narrow, narrow))
        self.objectness = objectness_layer(narrow)
        self.box = nn.Linear(narrow, 4)
        nn.init.zeros_(self.box.weight)
        with torch.no_grad():
            self.box.bias.copy_(torch.tensor([0.0, 0.0, *[math.log(INITIAL_CELLS)] * 2]))
        self.content = nn.Linear(width, width)
        nn.init.normal_(self.content.weight, std=0.02)  # small, as learned contents are

    def forward(self, memory: Memory) -> Proposals:
        """Return the proposals of N images."""
        assert memory.extents is not None, "proposals need a pyramid"
        finest = memory.levels[0]
        _, rows, columns, _ = finest.shape
        cells = cells_of_images(rows, columns, memory.extents[:, 0])
        states = self._states(finest, memory.finest_sizes).flatten(1, 2).contiguous()  # as in the pyramid
        boxes = apply_deltas(cells, self.box(states))
        return Proposals(cells, boxes, self.objectness(states).squeeze(-1))

    def _states(
        self, finest: Float[Tensor, "N rows columns W"], sizes: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "N rows columns _"]:
        """Return what proposals are made from; images of one size together, as group norm would count padding."""
        if set(sizes) == {tuple(finest.shape[1:3])}:  # no padding, so nothing to copy
            return self.tower(finest)
        parts, order = [], []
        for (rows, columns), members in members_of(sizes).items():
            part = self.tower(finest[members, :rows, :columns])
            parts.append(F.pad(part, (0, 0, 0, finest.shape[2] - columns, 0, finest.shape[1] - rows)))
            order += members
        return torch.cat(parts)[[order.index(image) for image in range(len(sizes))]]

    def select(
        self, proposals: Proposals, finest: Float[Tensor, "N rows columns W"], count: int
    ) -> tuple[Float[Tensor, "N {count} 4"], Float[Tensor, "N {count} W"], Bool[Tensor, "N {count} 1"]]:
        """Return boxes, contents and which of them are there, of the `count` best peaks."""
        best, found = best_peaks(proposals, finest.shape[1:3], count)
        rows = torch.arange(len(best), device=best.device)[:, None]
        return proposals.pred_boxes[rows, best], self.content(finest.flatten(1, 2)[rows, best]), found[..., None]


def cells_of_images(rows: int, columns: int, extents: Float[Tensor, "N 2"]) -> Float[Tensor, "N {rows}*{columns} 4"]:
    """Return the cells of a padded map, cxcywh in [0, 1] of each image and zero at padding.

    `extents` are the shares (x, y) of the map that an image covers; its cells have the bits that they have alone.
    """
    y, x = torch.meshgrid(*(torch.arange(size, device=extents.device) for size in (rows, columns)), indexing="ij")
    centers = torch.stack([x, y], dim=-1).flatten(0, 1) + 0.5  # (P, 2), in cells
    sizes = torch.stack([extents[:, 0] * columns, extents[:, 1] * rows], dim=-1).round()[:, None]  # (N, 1, 2)
    cells = torch.cat([centers / sizes, (1 / sizes).expand(-1, len(centers), -1)], dim=-1)
    return torch.where((centers < sizes).all(-1, keepdim=True), cells, 0.0)


@torch.no_grad()
def best_peaks(
    proposals: Proposals, size: tuple[int, ...], count: int
) -> tuple[Int64[Tensor, "N {count}"], Bool[Tensor, "N {count}"]]:
    """Return the indices (N, count) of the best cells that no neighbour exceeds, and which of them are such cells."""
    is_cell = proposals.cells[..., 2] > 0
    scores = proposals.pred_objectness.masked_fill(~is_cell, -math.inf)
    highest = F.max_pool2d(scores.unflatten(1, size)[:, None], 3, stride=1, padding=1).flatten(1)
    scores = scores.masked_fill((scores < highest) | ~is_cell, -math.inf)
    missing = max(0, count - scores.shape[1])
    # Stable: of equal peaks the first ones, as in a map without padding.
    best, indices = F.pad(scores, (0, missing), value=-math.inf).sort(dim=1, descending=True, stable=True)
    return indices[:, :count].clamp(max=scores.shape[1] - 1), best[:, :count] > -math.inf
