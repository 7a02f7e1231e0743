"""The detection memory: what the head may look at, one padded row of tokens an image.

Vision tokens of the student image (with their 2-D positions), then the hidden states of the sample's prompt. The
student's answer is never part of it: it holds the ground truth and does not exist at inference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Memory:
    """Letters as in `recipe.schema`.

    Attributes:
        tokens: (N, M, W).
        positions: (N, M, W) sine embedding of the token's centre; zero for words.
        mask: (N, M) bool, True at real tokens.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor

    def repeat_rows(self, index: Tensor) -> "Memory":
        """The rows `index` (n,) as a new memory."""
        return Memory(self.tokens[index], self.positions[index], self.mask[index])


class Adapter(nn.Module):
    """Residual bottleneck MLP from the language model's width to the head's.

    Args:
        hidden_size: Width of the input.
        width: Width of the output.
        ratio: The bottleneck is `hidden_size // ratio` wide.
    """

    def __init__(self, hidden_size: int, width: int, ratio: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.down = nn.Linear(hidden_size, max(1, hidden_size // ratio))
        self.up = nn.Linear(max(1, hidden_size // ratio), hidden_size)
        self.project = nn.Linear(hidden_size, width) if width != hidden_size else nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) → (..., W)."""
        hidden_states = self.norm(hidden_states)
        return self.project(hidden_states + self.up(nn.functional.gelu(self.down(hidden_states))))


class MemoryBuilder(nn.Module):
    """Vision and language adapters, joined into one memory an image.

    Args:
        hidden_size: Width of the vision features and hidden states.
        width: Of the head; a multiple of 4.
        adapter_ratio: See `Adapter`.
        memory_positions: False: the plain design, whose keys do not tell where they are.
    """

    def __init__(self, hidden_size: int, width: int, adapter_ratio: int, memory_positions: bool):
        super().__init__()
        self.width = width
        self.memory_positions = memory_positions
        self.vision_adapter = Adapter(hidden_size, width, adapter_ratio)
        self.language_adapter = Adapter(hidden_size, width, adapter_ratio)

    def forward(
        self,
        image_features: Sequence[Tensor],
        grid_sizes: Sequence[tuple[int, int]],
        prompt_states: Tensor,
        prompt_mask: Tensor,
    ) -> Memory:
        """Builds the memory of N images; vision tokens first, then words, each part padded by itself.

        Args:
            image_features: N of (tokens, D), raster order.
            grid_sizes: (rows, columns) of vision tokens of each image.
            prompt_states: (N, S, D).
            prompt_mask: (N, S) bool, True at real tokens.
        """
        device, dtype = prompt_states.device, self.vision_adapter.norm.weight.dtype
        vision = pad_sequence(list(image_features), batch_first=True).to(dtype)  # (N, tokens, D)
        lengths = torch.tensor([len(features) for features in image_features], device=device)
        vision_mask = torch.arange(vision.shape[1], device=device) < lengths[:, None]
        words = self.language_adapter(prompt_states.to(dtype))
        tokens = torch.cat([self.vision_adapter(vision), words], dim=1)  # (N, M, W)
        positions = torch.zeros_like(tokens)
        if self.memory_positions:
            centers = [grid_centers(*size, device=device) for size in grid_sizes]
            embedded = sine_embedding(pad_sequence(centers, batch_first=True), self.width)
            positions[:, : vision.shape[1]] = embedded.to(tokens.dtype)
        return Memory(tokens, positions, torch.cat([vision_mask, prompt_mask], dim=1))


def grid_centers(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Centres of a grid's cells in raster order: (rows * columns, 2), x then y, in [0, 1]."""
    y = (torch.arange(rows, device=device) + 0.5) / rows
    x = (torch.arange(columns, device=device) + 0.5) / columns
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid_x.flatten(), grid_y.flatten()], dim=-1)


def sine_embedding(coordinates: Tensor, width: int, temperature: float = 20.0) -> Tensor:
    """Sine and cosine waves of each coordinate, as in DETR (temperature as in DAB-DETR).

    Args:
        coordinates: (..., n) in [0, 1].
        width: Of the embedding; a multiple of 2n.
        temperature: Ratio of the shortest to the longest wave.

    Returns:
        (..., width), `width / n` numbers a coordinate.
    """
    num_waves = width // coordinates.shape[-1] // 2
    exponents = torch.arange(num_waves, device=coordinates.device, dtype=coordinates.dtype) / num_waves
    angles = coordinates[..., None] * (2 * math.pi) * temperature**exponents  # (..., n, waves)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
