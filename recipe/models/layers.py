"""Building blocks that the detection head and the caption decoder share."""

from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

LOCALITY = 4.0  # what an equal position initially adds to the argument of the softmax


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
