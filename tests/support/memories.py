"""Make memories of images that no vision tower has seen."""

import torch
from torch import Tensor

from recipe.schema import Memory


def random_memory(num_words: list[int], width: int, generator: torch.Generator) -> Memory:
    """Return `num_words` tokens of each image, padded, and a pyramid of maps of which the last image covers half."""
    mask = torch.arange(max(num_words)) < torch.tensor(num_words)[:, None]
    tokens, positions = torch.randn(2, *mask.shape, width, generator=generator, dtype=torch.float64)
    shapes = [(len(mask), side, side, width) for side in (16, 8, 4, 2)]
    levels = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    extents = torch.ones(len(mask), len(levels), 2, dtype=torch.float64)
    extents[-1, :, 0] = 0.5
    for level in levels:
        level[-1, :, level.shape[2] // 2 :] = 0
    return Memory(
        tokens, positions, mask, torch.zeros(*mask.shape, 4), levels, extents, [*[(16, 16)] * (len(mask) - 1), (16, 8)]
    )


def of_image(memory: Memory, image: int, padded: bool = True) -> Memory:
    """Return the memory of one image of several; `padded`: with the tokens that make it as long as the others."""
    real = slice(None) if padded else memory.mask[image]
    one = slice(image, image + 1)
    return Memory(
        memory.tokens[one, real],
        memory.positions[one, real],
        memory.mask[one, real],
        memory.cells[one, real],
        [level[one] for level in memory.levels],
        None if memory.extents is None else memory.extents[one],
        memory.finest_sizes[one],
    )


def of_map(level: Tensor, extent: tuple[float, float] = (1.0, 1.0)) -> Memory:
    """Return a memory of one map (1, rows, columns, W) without words, of which the image covers `extent`."""
    nothing = torch.zeros(1, 1, 1)
    extents = torch.tensor([[extent]], dtype=torch.float64)
    size = (round(level.shape[1] * extent[1]), round(level.shape[2] * extent[0]))
    return Memory(nothing, nothing, nothing, nothing, [level], extents, [size])
