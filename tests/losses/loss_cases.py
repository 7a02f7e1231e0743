"""Random predictions and targets for the tests of the losses."""

import torch
from torch import Tensor

from recipe.schema import DetectionOutputs, LossCounts, Target

COUNTS = LossCounts(teacher_tokens=1, student_tokens=1, objects=1, images=1, microbatches=1)


def random_boxes(*shape: int, generator: torch.Generator) -> Tensor:
    """(*shape, 4) float64 cxcywh inside the image."""
    size = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 0.4 + 0.05
    center = size / 2 + torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * (1 - size)
    return torch.cat([center, size], dim=-1)


def make_outputs(boxes: Tensor, logits: Tensor, aux_outputs: list[DetectionOutputs] | None = None) -> DetectionOutputs:
    """Of boxes (N, Q, 4) and logits (N, Q)."""
    return DetectionOutputs(boxes, logits, boxes, aux_outputs or [])


def random_outputs(num_images: int, num_queries: int, seed: int, num_layers: int = 1) -> DetectionOutputs:
    generator = torch.Generator().manual_seed(seed)
    layers = [
        make_outputs(
            random_boxes(num_images, num_queries, generator=generator).requires_grad_(),
            torch.randn(num_images, num_queries, generator=generator, dtype=torch.float64).requires_grad_(),
        )
        for _ in range(num_layers)
    ]
    last = layers.pop()
    last.aux_outputs = layers
    return last


def make_target(boxes: Tensor) -> Target:
    return {"boxes": boxes, "caption_ids": torch.zeros(len(boxes), 1, dtype=torch.int64)}


def random_targets(counts: list[int | None], seed: int) -> list[Target | None]:
    """One a number of objects; None: not annotated."""
    generator = torch.Generator().manual_seed(seed)
    return [None if count is None else make_target(random_boxes(count, generator=generator)) for count in counts]
