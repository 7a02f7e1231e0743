"""Where the patches of images are: the vision tower's windows and positions, kept per size of an image.

transformers 4 makes tens of small tensors for each image and call.
"""

from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


@lru_cache(maxsize=1024)
def windows_of_image(rows: int, columns: int, side: int) -> tuple[Int64[Tensor, " tokens"], tuple[int, ...]]:
    """Return the tokens of a grid in raster order, window by window, and the tokens of each window.

    Windows are `side` x `side` tokens, fewer at the right and lower edge.
    """
    with torch.inference_mode(False):  # kept: a tensor made in inference mode could not be used in training
        row, column = (torch.arange(count) // side for count in (rows, columns))
        window = (row[:, None] * -(-columns // side) + column).flatten()
        return window.argsort(stable=True), tuple(window.bincount().tolist())


def windows_of_images(
    grid_thw: Int64[Tensor, "I 3"], merge: int, side: int
) -> tuple[Int64[Tensor, " tokens"], list[int]]:
    """Return what the tower's own `get_window_index` does: the order of all tokens, and the ends of windows in patches.

    Args:
        grid_thw: Of the images, in patches.
        merge: Patches along the side of a token.
        side: Tokens along the side of a window.
    """
    orders, ends, start = [], [0], 0
    for time, height, width in grid_thw.tolist():
        order, lengths = windows_of_image(height // merge, width // merge, side)
        for _ in range(time):
            orders.append(order + start)
            start += len(order)
            ends += [ends[-1] + merge**2 * end for end in accumulate(lengths)]
    return torch.cat(orders), ends


@lru_cache(maxsize=1024)
def patch_positions(height: int, width: int, merge: int) -> Int64[Tensor, "P 2"]:
    """Return (row, column) of an image's patches in the order in which the tower reads them, token by token."""
    with torch.inference_mode(False):
        grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1)
        return grid.view(height // merge, merge, width // merge, merge, 2).transpose(1, 2).reshape(-1, 2)


def rotary_angles(frequencies: nn.Module, grid_thw: Int64[Tensor, "I 3"], merge: int) -> Float[Tensor, "P angles"]:
    """Return what the tower's own `rot_pos_emb` does: the angles of each patch; `frequencies` is its module."""
    grids = grid_thw.tolist()
    positions = torch.cat([patch_positions(height, width, merge).repeat(time, 1) for time, height, width in grids])
    table: Tensor = frequencies(max(max(grid[1:]) for grid in grids))
    return table[positions.to(table.device)].flatten(1)


def window_order(visual: Any, image_grid_thw: Int64[Tensor, "I 3"]) -> Int64[Tensor, " tokens"]:
    """Return the order in which a tower with windows keeps the tokens of all images."""
    if hasattr(visual, "get_window_index"):
        return visual.get_window_index(image_grid_thw)[0]
    from transformers.vision_utils import get_vision_window_index  # type: ignore[import-not-found]  # transformers 5

    return get_vision_window_index(image_grid_thw, visual.spatial_merge_size, visual.window_size, visual.patch_size)[0]
