"""Denoising queries (DN-DETR; contrastive as in DINO, section 3.3): noised ground truth that the decoder must restore.

They need no matching, so they teach the decoder to refine boxes from the first step. The noise of an image depends
on its seed alone, never on the rest of the batch, so training stays exact under microbatches, ranks and resume.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recipe.schema import DenoisingQueries, Target


def attention_mask(queries: DenoisingQueries, num_queries: int, num_groups: int = 1) -> Tensor:
    """Return the self-attention mask, denoising queries first: (N, 1, total, total) bool, True if row may see column.

    Object queries never see denoising queries, which hold the ground truth. Groups do not see one another, except that
    denoising queries see the first group of object queries. Padding is seen only by itself. `num_queries` counts the
    object queries of all `num_groups` groups.
    """
    device, count = queries.boxes.device, len(queries)
    noised = torch.arange(queries.num_groups, device=device).repeat_interleave(count // queries.num_groups)  # (R,)
    group = torch.cat([noised, group_numbers(num_queries, num_groups, device)])
    visible = torch.ones(len(queries.boxes), len(group), dtype=torch.bool, device=device)
    visible[:, :count] = queries.valid
    sees = group[:, None] == group[None, :]
    sees[:count] |= (group == -1)[None, :]
    itself = torch.eye(len(group), dtype=torch.bool, device=device)
    return (sees & visible[:, None, :] | itself)[:, None]


def group_numbers(num_queries: int, num_groups: int, device: torch.device) -> Tensor:
    """Return the group of each object query: (num_queries,) int64, -1, -2 and so on."""
    return -1 - torch.arange(num_groups, device=device).repeat_interleave(num_queries // num_groups)


def make_denoising_queries(
    targets: Sequence[Target | None], noise_seeds: Sequence[int], num_groups: int, box_noise: float
) -> DenoisingQueries | None:
    """Return noised ground truth of N images; None if no image has an object or `num_groups` is 0.

    Args:
        targets: N of them; None if not annotated.
        noise_seeds: N integers; the same seed and boxes give the same noise.
        num_groups: G.
        box_noise: Positives move each corner by less than this many half sizes, negatives by one to two times as much;
            then both are clipped to the image, as in DINO.
    """
    annotated = [target["boxes"] for target in targets if target is not None]
    if num_groups == 0 or not any(map(len, annotated)):
        return None
    device = annotated[0].device
    clean = [torch.zeros(0, 4, device=device) if target is None else target["boxes"] for target in targets]
    noised = [_noise(boxes, seed, num_groups, box_noise) for boxes, seed in zip(clean, noise_seeds, strict=True)]
    noised, counts = [part.transpose(0, 1) for part in noised], [len(boxes) for boxes in clean]
    references = pad_sequence(noised, batch_first=True, padding_value=0.5)  # (N, T, 2G, 4)
    target_boxes = pad_sequence(clean, batch_first=True, padding_value=0.5)  # (N, T, 4)
    num_images, longest = target_boxes.shape[:2]
    valid = torch.arange(longest, device=device) < torch.tensor(counts).to(device, non_blocking=True)[:, None]
    positive = (torch.arange(2 * num_groups, device=device) % 2 == 0).repeat_interleave(longest)
    return DenoisingQueries(
        boxes=references.transpose(1, 2).reshape(num_images, -1, 4),
        valid=valid.repeat(1, 2 * num_groups),
        target_boxes=target_boxes.repeat(1, 2 * num_groups, 1),
        positive=positive.expand(num_images, -1),
        num_groups=num_groups,
    )


def _noise(boxes: Tensor, seed: int, num_groups: int, box_noise: float) -> Tensor:
    """Return boxes (T, 4) cxcywh with noise, as (2G, T, 4): for each group the positives, then the negatives."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_groups, 2, len(boxes), 4)
    size = torch.rand(shape, generator=generator)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    size[:, 1] += 1  # a negative moves at least as far as the farthest positive
    shift = (size * sign * box_noise).to(boxes, non_blocking=True)
    half = boxes[:, 2:] / 2
    corners = torch.cat([boxes[:, :2] - half, boxes[:, :2] + half], dim=-1)
    corners = (corners + shift * torch.cat([half, half], dim=-1)).clamp(0, 1)
    low, high = torch.minimum(corners[..., :2], corners[..., 2:]), torch.maximum(corners[..., :2], corners[..., 2:])
    return torch.cat([(low + high) / 2, high - low], dim=-1).flatten(0, 1)
