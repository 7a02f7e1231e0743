"""Building blocks that the detection head and the caption decoder share."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

LOCALITY = 4.0  # what an equal position initially adds to the argument of the softmax
PRIOR_PROBABILITY = 0.01  # initial objectness (focal loss, Lin et al. 2017, section 3.3)


class Attention(nn.Module):
    """Multi-head attention over `F.scaled_dot_product_attention`, with keys that can be cached.

    Positions, if given, have their own projections, and the score of a pair is content · content + position · position
    (Conditional DETR, section 3.3).

    Args:
        width: Of queries, keys and values; a multiple of `num_heads`.
        positional: Queries and keys come with positions.
        local: With sine embeddings as positions, a query at first looks around its own position: both projections start
            equal, so large that an equal position adds about `LOCALITY`.
    """

    def __init__(self, width: int, num_heads: int, positional: bool = False, local: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.query_position = nn.Linear(width, width) if positional else None
        self.key_position = nn.Linear(width, width, bias=False) if positional else None
        if self.query_position is not None and self.key_position is not None and local:
            # Per head of width d: d rows with entries of variance 1 / 3W, times W / 2 waves, over softmax's sqrt(2d).
            gain = (LOCALITY * 6 * (2 / (width // num_heads)) ** 0.5) ** 0.5
            with torch.no_grad():
                self.key_position.weight.copy_(self.query_position.weight.mul_(gain))
                self.query_position.bias.zero_()

    def keys_values(
        self, states: Float[Tensor, "N M W"], positions: Float[Tensor, "N M W"] | None = None
    ) -> tuple[Float[Tensor, "N heads M key"], Float[Tensor, "N heads M value"]]:
        """Return keys and values for `forward`."""
        keys = self._split(self.key(states))
        if self.key_position is not None:
            assert positions is not None
            keys = torch.cat([keys, self._split(self.key_position(positions))], dim=-1)
        return keys, self._split(self.value(states))

    def query_positions(
        self, positions: Float[Tensor, "N Q W"] | Float[Tensor, "N heads Q W"]
    ) -> Float[Tensor, "N heads Q key"]:
        """Return for `forward` what positions, the same for all heads or of each, add to the queries."""
        assert self.query_position is not None
        if positions.dim() == 3:
            return self._split(self.query_position(positions))
        weight = self.query_position.weight.unflatten(0, (self.num_heads, -1))  # (heads, ·, W)
        bias = self.query_position.bias.view(self.num_heads, 1, -1)
        return torch.einsum("nhqw,hdw->nhqd", positions, weight) + bias

    def forward(
        self,
        states: Float[Tensor, "N Q W"],
        keys_values: tuple[Float[Tensor, "N heads M key"], Float[Tensor, "N heads M value"]],
        positions: Float[Tensor, "N heads Q position"] | None = None,
        mask: Bool[Tensor, "#N #heads #Q #M"] | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "N Q W"]:
        """Attend from `states` to the keys.

        `positions` come from `query_positions`, if the module is positional. `mask` is True if a query may see a key.
        `is_causal`: query i sees keys 0 to i.
        """
        queries = self._split(self.query(states))
        if positions is not None:
            queries = torch.cat([queries, positions], dim=-1)
        keys, values = keys_values
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=is_causal)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, ·, W / heads)


class DeformableAttention(nn.Module):
    """Read maps of several scales at a few learned points around each query's box (Deformable DETR, section 4.1).

    Points are in half box sizes from the box's centre: at first each head looks into its own direction, point after
    point farther out.

    Args:
        width: Of queries and maps; a multiple of `num_heads`.
        num_levels: Maps.
        num_points: Points of each head in each map.
    """

    def __init__(self, width: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        self.shape = (num_heads, num_levels, num_points)
        self.offsets = nn.Linear(width, 2 * math.prod(self.shape))
        self.weights = nn.Linear(width, math.prod(self.shape))
        self.value = nn.Linear(width, width, bias=False)  # padding must stay zero, as what is outside a map is
        self.out = nn.Linear(width, width)
        distances = (torch.arange(num_points) + 0.5) / num_points
        points = compass(num_heads)[:, None, None] * distances[:, None]  # (heads, 1, points, 2)
        with torch.no_grad():
            self.offsets.bias.copy_(points.expand(*self.shape, 2).flatten())
        for zero in (self.offsets.weight, self.weights.weight, self.weights.bias):
            nn.init.zeros_(zero)

    def forward(
        self,
        states: Float[Tensor, "N Q W"],
        boxes: Float[Tensor, "N Q 4"],
        levels: Sequence[Float[Tensor, "N _ _ W"]],
        extents: Float[Tensor, "N levels 2"],
    ) -> Float[Tensor, "N Q W"]:
        """Return what `states` read around their `boxes`, cxcywh, relative to their image.

        `extents` are the shares (x, y) of each map that an image covers.
        """
        (num_heads, _, num_points), num_images = self.shape, len(states)
        weights = self.weights(states).unflatten(-1, (num_heads, -1)).softmax(-1).unflatten(-1, (-1, num_points))
        offsets = self.offsets(states).unflatten(-1, (*self.shape, 2)).to(boxes.dtype)
        centers, halves = (part[:, :, None, None, None] for part in (boxes[..., :2], boxes[..., 2:] / 2))
        points = (centers + offsets * halves) * extents[:, None, None, :, None]  # (N, Q, heads, levels, points, 2)
        points = points.permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (levels, N * heads, Q, points, 2)
        read = []  # of each map (N * heads, W / heads, Q, points)
        for level, places in zip(levels, points, strict=True):
            values = self.value(level).unflatten(-1, (num_heads, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
            read.append(read_map(values, places))
        weights = weights.transpose(1, 2).flatten(3).flatten(0, 1)[:, None]  # (N * heads, 1, Q, levels * points)
        read = (torch.cat(read, dim=-1) * weights).sum(-1)  # (N * heads, W / heads, Q)
        read = read.view(num_images, -1, read.shape[-1]).transpose(1, 2)
        return self.out(read.contiguous().to(states.dtype))  # contiguous: as in the pyramid


def read_map(
    maps: Float[Tensor, "N C _ _"], points: Float[Tensor, "N rows columns 2"]
) -> Float[Tensor, "N C rows columns"]:
    """Return maps at points (x, y) in [0, 1]: bilinear between cells, zero outside, in the precision of the points."""
    return F.grid_sample(maps.to(points.dtype), 2 * points - 1, align_corners=False)


def compass(num_heads: int) -> Float[Tensor, "{num_heads} 2"]:
    """Return points on the edge of the square [-1, 1]²: the initial sampling points of Deformable DETR."""
    angles = torch.arange(num_heads) * (2 * math.pi / num_heads)
    points = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return points / points.abs().amax(-1, keepdim=True)


class FeedForward(nn.Sequential):
    """The transformer's feed-forward block, `factor` times as wide inside."""

    def __init__(self, width: int, factor: int, dropout: float):
        inner = width * factor
        super().__init__(nn.Linear(width, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, width))


class MLP(nn.Sequential):
    """Linear layers with ReLU between them: DETR's box head."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, num_layers: int):
        sizes = [in_features, *[hidden_features] * (num_layers - 1), out_features]
        layers: list[nn.Module] = []
        for size_in, size_out in pairwise(sizes):
            layers += [nn.Linear(size_in, size_out), nn.ReLU()]
        super().__init__(*layers[:-1])


def objectness_layer(width: int) -> nn.Linear:
    """Return a layer from features to one logit, at first that of `PRIOR_PROBABILITY`."""
    layer = nn.Linear(width, 1)
    nn.init.constant_(layer.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
    return layer
