"""Attention for packed rows on any device: one `scaled_dot_product_attention` per sample, no mask, no padding.

Registered with transformers under `NAME`; flash-attention 2, if installed, has a kernel that does the same.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "packed_sdpa"


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    segment_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attended values (B, L, heads, ·) and no weights, as transformers' attention functions do.

    `query` is (B, heads, L, ·), `key` and `value` (B, key heads, L', ·). A packed row has `segment_lengths`, the tokens
    of each sample, and no mask. `is_causal` is by default the layer's own; `kwargs` are not used.

    Raises:
        ValueError: The segments do not cover the row.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:  # on CPU `enable_gqa` takes the slow kernel
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if segment_lengths is None:
        causal = causal and attention_mask is None and query.shape[2] > 1
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, is_causal=causal
        )
        return attended.transpose(1, 2), None
    if query.shape[0] != 1 or sum(segment_lengths) != query.shape[2]:
        raise ValueError(
            f"segments of {segment_lengths} tokens do not cover a row of shape {tuple(query.shape[:3:2])}: "
            "use recipe.data.collate.collate_packed"
        )
    parts = zip(*(states.split(segment_lengths, dim=2) for states in (query, key, value)), strict=True)
    attended = [F.scaled_dot_product_attention(q, k, v, None, dropout, causal, scale=scaling) for q, k, v in parts]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def packed_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Return no mask for a packed row, and sdpa's own for padded rows and cached generation."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def register() -> str:
    """Register `NAME` with transformers and return it."""
    AttentionInterface.register(NAME, packed_sdpa)
    AttentionMaskInterface.register(NAME, packed_mask)
    return NAME
