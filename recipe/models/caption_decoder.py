"""The caption decoder: writes what a query found, token by token.

A caption's sequence begins with its query's features instead of a start token, so every later token attends to them in
every layer. With a feature pyramid they include what the finest map shows in the box, point by point, as the box head
of Faster R-CNN reads it: shapes are words, but a query needs no shape to find its box. Each caption is one row; only
cross-attention concatenates the captions of an image, so that the image's memory is never copied per caption. Token
embedding and output matrix are the language model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from recipe.models.layers import Attention, FeedForward, read_map
from recipe.models.memory import sides_in_tokens, sine_embedding
from recipe.schema import CaptionPlaces, Memory

KeysValues = tuple[Tensor, Tensor]
REGION = 4  # points along each side of a box


@dataclass(frozen=True)
class TokenTree:
    """Token sequences that share their beginnings, as C nodes, parents first; the first is the root, before any token.

    Attributes:
        tokens: (C - 1,) int64, the tokens of all nodes but the root.
        depths: (C,) int64, the number of tokens from the root to a node.
        mask: (C, C) bool: True if the column is the row's node or one of its ancestors.
    """

    tokens: Tensor
    depths: Tensor
    mask: Tensor


@dataclass(frozen=True)
class LayerCache:
    """What generation keeps of one layer between tokens.

    Attributes:
        memory: Keys and values of the memory.
        positions: (N, heads, T, ·), the position each caption looks at.
        past: Keys and values of the tokens so far.
    """

    memory: KeysValues
    positions: Tensor
    past: KeysValues


@dataclass
class CaptionCache:
    """What generation keeps between tokens; `layers` is empty before the first."""

    layers: list[LayerCache] = field(default_factory=list)
    length: int = 0


class CaptionLayer(nn.Module):
    """Causal self-attention along a caption, cross-attention to the image's memory, feed-forward; pre-norm."""

    def __init__(self, width: int, num_heads: int, ffn_factor: int, dropout: float):
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, num_heads)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, num_heads, positional=True, local=True)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = FeedForward(width, ffn_factor, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        states: Float[Tensor, "R C W"],
        places: CaptionPlaces,
        memory: Memory,
        centers: Float[Tensor, "N T W"] | None,
        cache: LayerCache | None,
        mask: Bool[Tensor, "1 1 C C"] | None = None,
    ) -> tuple[Float[Tensor, "R C W"], LayerCache]:
        """Advance R captions by C tokens: return their states and the cache including these tokens.

        Args:
            states: Of the tokens.
            places: Of the captions.
            memory: Of the N images.
            centers: Embedding of the box centres; read only at the first token.
            cache: Of earlier tokens; None at the first.
            mask: True if the row's token may see the column's; None: it sees all before it.
        """
        length = states.shape[1]
        normed = self.self_norm(states)
        keys, values = self.self_attention.keys_values(normed)
        if cache is None:
            memory_keys_values = self.cross_attention.keys_values(memory.tokens, memory.positions)
            assert centers is not None, "the first token needs its box"
            positions = self.cross_attention.query_positions(centers)
        else:
            assert length == 1, "with a cache, one token at a time"
            memory_keys_values, positions = cache.memory, cache.positions
            keys, values = torch.cat([cache.past[0], keys], dim=2), torch.cat([cache.past[1], values], dim=2)
        attended = self.self_attention(normed, (keys, values), mask=mask, is_causal=cache is None and mask is None)
        states = states + self.dropout(attended)
        queries = places.side_by_side(self.cross_norm(states)).flatten(1, 2)  # (N, T * C, W)
        of_tokens = positions.repeat_interleave(length, dim=2) if length > 1 else positions
        attended = self.cross_attention(queries, memory_keys_values, of_tokens, memory.mask[:, None, None, :])
        states = states + self.dropout(places.rows(attended.unflatten(1, (places.num_slots, length))))
        states = states + self.dropout(self.ffn(self.ffn_norm(states)))
        return states, LayerCache(memory_keys_values, positions, (keys, values))


class CaptionDecoder(nn.Module):
    """Captions of R queries of N images.

    Args:
        hidden_size: D, of the language model's token embedding.
        width: Of the head.
        ffn_factor: Width of the feed-forward blocks, as a multiple of `width`.
        max_caption_tokens: Longest caption, including end-of-sequence.
        multi_scale: Captions read the memory's finest map.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        num_heads: int,
        num_layers: int,
        ffn_factor: int,
        dropout: float,
        max_caption_tokens: int,
        multi_scale: bool = False,
    ):
        super().__init__()
        self.width = width
        self.max_caption_tokens = max_caption_tokens
        self.start = nn.Linear(width, width)
        self.region = nn.Linear(REGION**2 * width, width) if multi_scale else None
        self.token_norm = nn.LayerNorm(hidden_size)
        self.token_in = nn.Linear(hidden_size, width) if hidden_size != width else nn.Identity()
        self.token_positions = nn.Embedding(max_caption_tokens, width)
        self.layers: Sequence[CaptionLayer] = cast(
            Sequence[CaptionLayer],
            nn.ModuleList(CaptionLayer(width, num_heads, ffn_factor, dropout) for _ in range(num_layers)),
        )
        self.norm = nn.LayerNorm(width)
        self.token_out = nn.Linear(width, hidden_size) if hidden_size != width else nn.Identity()

    def forward(
        self,
        query_features: Float[Tensor, "R W"],
        boxes: Float[Tensor, "R 4"],
        places: CaptionPlaces,
        memory: Memory,
        token_embeds: Float[Tensor, "R tokens D"] | None,
        cache: CaptionCache | None = None,
        tree: TokenTree | None = None,
    ) -> Float[Tensor, "R C D"]:
        """Return the hidden states, ready for the output matrix, that predict each caption's next token.

        Teacher forcing: `token_embeds` are a caption's tokens but the last; step i then predicts token i. With a cache,
        one step at a time (C = 1): first without `token_embeds`, then with the token just chosen. With a tree,
        `token_embeds` are its tokens', and the states are those of its nodes.

        Args:
            query_features: Of the queries.
            boxes: Their cxcywh, relative to the image; no gradient flows into them.
            places: Of the captions.
            memory: Of the N images.
            token_embeds: Embeddings of the tokens so far, C - 1 without a cache; None for none.
            cache: Advanced in place; start with a new one.
            tree: Of continuations of one caption; without a cache.
        """
        parts, centers = [], None
        if cache is None or not cache.layers:
            start = self.start(query_features)
            if self.region is not None:
                start = start + self.region(read_regions(boxes.detach(), places, memory).to(start.dtype))
            parts.append(start[:, None])
            found_at = boxes[..., :2].detach() * sides_in_tokens(memory.cells).to(boxes)[places.image]
            centers = places.side_by_side(sine_embedding(found_at, self.width))
        if token_embeds is not None:
            parts.append(self.token_in(self.token_norm(token_embeds.to(self.start.weight.dtype))))
        states = torch.cat(parts, dim=1)  # (R, C, W)
        first, length = (0 if cache is None else cache.length), states.shape[1]
        depths = slice(first, first + length) if tree is None else tree.depths
        states = states + self.token_positions.weight[depths]
        kept = []
        for i, layer in enumerate(self.layers):
            layer_cache = cache.layers[i] if cache and cache.layers else None
            states, layer_cache = layer(
                states, places, memory, centers, layer_cache, None if tree is None else tree.mask[None, None]
            )
            kept.append(layer_cache)
        if cache is not None:
            cache.layers, cache.length = kept, first + length
        return self.token_out(self.norm(states))


def read_regions(boxes: Float[Tensor, "R 4"], places: CaptionPlaces, memory: Memory) -> Float[Tensor, "R values"]:
    """Return the finest map of each box's image at points of a regular grid in the box, row by row.

    As RoIAlign (He et al. 2017) with one point per bin, but zero outside the image, so that padding changes nothing.
    """
    assert memory.extents is not None, "regions need a pyramid"
    steps = (torch.arange(REGION, device=boxes.device, dtype=boxes.dtype) + 0.5) / REGION - 0.5
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).flatten(0, 1)  # (points, 2)
    points = places.side_by_side(boxes[:, None, :2] + grid * boxes[:, None, 2:])  # (N, T, points, 2)
    points = points * memory.extents[:, :1, None].to(points.dtype)
    found = read_map(memory.levels[0].permute(0, 3, 1, 2), points)  # (N, W, T, points)
    return places.rows(found.permute(0, 2, 3, 1)).flatten(1)
