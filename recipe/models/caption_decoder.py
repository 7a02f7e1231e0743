"""The caption decoder: writes what a query found, token by token.

A caption's sequence begins with its query's features in the place of a start token, so every later token attends to
them in every layer; cross-attention reads the image's memory, all captions of an image in one row, so that the memory
is never copied per caption. Token embedding and output matrix are the language model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from recipe.models.layers import Attention, FeedForward
from recipe.models.memory import Memory, sine_embedding

KeysValues = tuple[Tensor, Tensor]


class CaptionLayer(nn.Module):
    """Causal self-attention along a caption, cross-attention to the image's memory, feed-forward; pre-norm.

    Args:
        width: Of the decoder and the memory.
        num_heads: Heads.
        ffn_factor: Width of the feed-forward block in widths.
        dropout: Of each block's result.
    """

    def __init__(self, width: int, num_heads: int, ffn_factor: int, dropout: float):
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, num_heads)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, num_heads, positional=True)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = FeedForward(width, ffn_factor, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        states: Tensor,
        past: KeysValues | None,
        memory_keys_values: KeysValues,
        memory_mask: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, KeysValues]:
        """Advances all captions by `C` tokens.

        Args:
            states: (N, T, C, W).
            past: Keys and values of the tokens before, or None at the first.
            memory_keys_values: The image memory's, from `cross_attention.keys_values`.
            memory_mask: (N, 1, 1, M).
            positions: (N, T * C, W) embedding of the box centres.

        Returns:
            (N, T, C, W), and the keys and values of all tokens so far.
        """
        length = states.shape[2]
        rows = self.self_norm(states).flatten(0, 1)  # (N * T, C, W)
        keys, values = self.self_attention.keys_values(rows)
        if past is not None:
            assert length == 1, "with a cache, one token at a time"
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        attended = self.self_attention(rows, (keys, values), is_causal=past is None)
        states = states + self.dropout(attended).view_as(states)
        queries = self.cross_norm(states).flatten(1, 2)  # (N, T * C, W)
        attended = self.cross_attention(queries, memory_keys_values, positions, memory_mask)
        states = states + self.dropout(attended).view_as(states)
        return states + self.dropout(self.ffn(self.ffn_norm(states))), (keys, values)


@dataclass
class CaptionCache:
    """What generation keeps between tokens: the memory's keys and values, and each layer's own."""

    memory: list[KeysValues]
    past: list[KeysValues] | None = None
    length: int = 0


class CaptionDecoder(nn.Module):
    """Captions of N images with T queries each (padded; rows of padding are computed and thrown away).

    Args:
        hidden_size: Of the language model's token embedding.
        width: Of the head.
        num_heads: Heads of each attention.
        num_layers: Layers.
        ffn_factor: Width of the feed-forward blocks in widths.
        dropout: Of each block's result.
        max_caption_tokens: Longest caption, end-of-sequence counted.
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
    ):
        super().__init__()
        self.width = width
        self.max_caption_tokens = max_caption_tokens
        self.start = nn.Linear(width, width)
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
        query_features: Tensor,
        boxes: Tensor,
        memory: Memory,
        token_embeds: Tensor | None,
        cache: CaptionCache | None = None,
    ) -> Tensor:
        """Hidden states that predict the next token of each caption.

        Teacher forcing: `token_embeds` are a caption's tokens but the last; step i then predicts token i. With a
        cache, one step at a time: first without `token_embeds`, then with the token just chosen.

        Args:
            query_features: (N, T, W).
            boxes: (N, T, 4) cxcywh in [0, 1] of the queries; no gradient flows into them.
            memory: Of the N images.
            token_embeds: (N, T, C - 1, D), the embeddings of the tokens so far; None for none.
            cache: From `start_cache`; advanced in place.

        Returns:
            (N, T, C, D), ready for the language model's output matrix; with a cache C = 1.
        """
        parts = []
        if cache is None or cache.past is None:
            parts.append(self.start(query_features)[:, :, None])
        if token_embeds is not None:
            parts.append(self.token_in(self.token_norm(token_embeds.to(self.start.weight.dtype))))
        states = torch.cat(parts, dim=2)  # (N, T, C, W)
        first, length = (0 if cache is None else cache.length), states.shape[2]
        states = states + self.token_positions.weight[first : first + length]
        centers = sine_embedding(boxes[..., :2].detach(), self.width).to(states.dtype)
        positions = centers[:, :, None].expand(-1, -1, length, -1).flatten(1, 2)  # (N, T * C, W)
        memory_keys_values = self.start_cache(memory).memory if cache is None else cache.memory
        memory_mask = memory.mask[:, None, None, :]
        past = []
        for i, layer in enumerate(self.layers):
            layer_past = cache.past[i] if cache is not None and cache.past is not None else None
            states, keys_values = layer(states, layer_past, memory_keys_values[i], memory_mask, positions)
            past.append(keys_values)
        if cache is not None:
            cache.past, cache.length = past, first + length
        return self.token_out(self.norm(states))

    def start_cache(self, memory: Memory) -> CaptionCache:
        """The cache of a generation that has written nothing yet."""
        keys_values = [layer.cross_attention.keys_values(memory.tokens, memory.positions) for layer in self.layers]
        return CaptionCache(keys_values)
