"""The detection memory: what the head may look at, one padded row of tokens per image, and maps of it (`pyramid.py`).

It holds the vision tokens of the student image (with their 2-D positions), then the hidden states of the sample's
prompt. It never holds the student's answer, which is the ground truth and does not exist at inference, nor what follows
an answer: in a chat of several images all have the words before the first answer.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from recipe.models.pyramid import CELLS_PER_TOKEN, FeaturePyramid
from recipe.schema import Memory

LONGEST_WAVE, SHORTEST_WAVE = 16.0, 0.25  # of embeddings of positions, in vision tokens


class Adapter(nn.Module):
    """Residual MLP from `hidden_size` to `width`, with a bottleneck of `hidden_size // ratio`."""

    def __init__(self, hidden_size: int, width: int, ratio: int):
        super().__init__()
        inner = max(1, hidden_size // ratio)
        self.norm = nn.LayerNorm(hidden_size)
        self.down = nn.Linear(hidden_size, inner)
        self.up = nn.Linear(inner, hidden_size)
        self.project = nn.Linear(hidden_size, width) if width != hidden_size else nn.Identity()

    def forward(self, hidden_states: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens W"]:
        """Project each token."""
        hidden_states = self.norm(hidden_states)
        return self.project(hidden_states + self.up(nn.functional.gelu(self.down(hidden_states))))


class MemoryBuilder(nn.Module):
    """Vision and language adapters, joined into one memory per image.

    Args:
        hidden_size: Width of the vision features and hidden states.
        width: Of the head; a multiple of 4.
        memory_positions: False: keys hold no positions.
        pyramid: Of the image's maps; None: the memory has none.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        adapter_ratio: int,
        memory_positions: bool,
        pyramid: FeaturePyramid | None = None,
    ):
        super().__init__()
        self.width = width
        self.memory_positions = memory_positions
        self.vision_adapter = Adapter(hidden_size, width, adapter_ratio)
        self.language_adapter = Adapter(hidden_size, width, adapter_ratio)
        self.pyramid = pyramid

    def forward(
        self,
        image_features: Sequence[Float[Tensor, "_ D"]],
        grid_sizes: Sequence[tuple[int, int]],
        prompt_states: Float[Tensor, "N S D"],
        prompt_mask: Bool[Tensor, "N S"],
        patch_features: Sequence[Float[Tensor, "_ _ C"]] = (),
        images: Sequence[Float[Tensor, "3 _ _"]] = (),
    ) -> Memory:
        """Return the memory of N images: vision tokens, then words, each part padded separately, and maps.

        Args:
            image_features: N of (tokens, D), raster order.
            grid_sizes: (rows, columns) of vision tokens of each image.
            prompt_states: Of each image's sample, padded.
            prompt_mask: True at real tokens.
            patch_features: N of (tokens, merge², C), before the merger; read by a pyramid alone.
            images: Normalized pixels; read by a pyramid alone.
        """
        device, dtype = prompt_states.device, self.vision_adapter.norm.weight.dtype
        cells_of = {size: grid_cells(*size, device=device) for size in set(grid_sizes)}
        vision = self.vision_adapter(pad_sequence(list(image_features), batch_first=True).to(dtype))
        cells = pad_sequence([cells_of[size] for size in grid_sizes], batch_first=True)  # (N, tokens, 4)
        cells = cells.to(torch.promote_types(dtype, torch.float32))  # bfloat16 would be off by a wave
        words = self.language_adapter(prompt_states.to(dtype))
        tokens = torch.cat([vision, words], dim=1)  # (N, M, W)
        mask = torch.cat([cells[..., 2] > 0, prompt_mask], dim=1)  # (N, M)
        cells = torch.cat([cells, cells.new_zeros(*words.shape[:2], 4)], dim=1)  # (N, M, 4)
        positions = torch.zeros_like(tokens)
        if self.memory_positions:
            places = cells[..., :2] * sides_in_tokens(cells)[:, None]
            positions = (sine_embedding(places, self.width) * (cells[..., 2:3] > 0)).to(dtype)
            tokens = tokens + positions  # so that what a query reads includes its position
        memory = Memory(tokens, positions, mask, cells)
        if self.pyramid is not None:
            memory.levels, memory.extents = self.pyramid(images, image_features, patch_features, grid_sizes)
            memory.finest_sizes = [(CELLS_PER_TOKEN * rows, CELLS_PER_TOKEN * columns) for rows, columns in grid_sizes]
        return memory


def grid_cells(rows: int, columns: int, device: torch.device | None = None) -> Float[Tensor, "{rows}*{columns} 4"]:
    """Return the cells of a grid in raster order: cxcywh in [0, 1]."""
    y = (torch.arange(rows, device=device) + 0.5) / rows
    x = (torch.arange(columns, device=device) + 0.5) / columns
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    size = torch.tensor([1 / columns, 1 / rows], device=device).expand(rows * columns, 2)
    return torch.cat([grid_x.reshape(-1, 1), grid_y.reshape(-1, 1), size], dim=-1)


def sides_in_tokens(cells: Float[Tensor, "N M 4"]) -> Float[Tensor, "N 2"]:
    """Return the (columns, rows) of images by the cells of their tokens; 1 without any."""
    sizes = cells[..., 2:].amax(1)
    return 1 / torch.where(sizes > 0, sizes, 1.0)


def sine_embedding(coordinates: Float[Tensor, "*points n"], width: int) -> Float[Tensor, "*points {width}"]:
    """Return sine and cosine waves of coordinates in vision tokens; `width` is a multiple of 2n.

    As in DETR, but for the unit: as shares of the image, a head that has learned from parts of images draws boxes twice
    as large on images of twice the side.
    """
    num_waves = width // coordinates.shape[-1] // 2
    exponents = torch.arange(num_waves, device=coordinates.device, dtype=coordinates.dtype) / num_waves
    turns = (LONGEST_WAVE / SHORTEST_WAVE) ** exponents / LONGEST_WAVE  # per token
    angles = coordinates[..., None] * (2 * math.pi) * turns  # (..., n, waves)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
