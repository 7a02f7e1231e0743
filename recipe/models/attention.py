"""Attention within the samples of a packed row and within the windows of the vision tower, on any device.

flash-attention 2, if installed, has a kernel for both; transformers calls it. Without it, `packed_sdpa` is registered
with transformers and `WindowAttention` replaces the vision tower's: torch's `varlen_attn` on a GPU (torch 2.10 and
later), else one call of `scaled_dot_product_attention` for all segments of equal length, and on a CPU, where the calls
cost less than putting them side by side, one for those that already are. No mask, no padding.
"""

import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from inspect import signature
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils.import_utils import is_flash_attn_2_available

PACKED = "packed_sdpa"
_HALF = (torch.float16, torch.bfloat16)
# Devices with one call per run of equal segments: on two cores at 16 heads of 80 one call per segment is 32 % faster
# than one per length for mixed ones (`window_seconds` in tests/benchmarks/step_speed.py).
LOOPING = ("cpu",)


def packed_sdpa(
    module: nn.Module,
    query: Float[Tensor, "B heads L width"],
    key: Float[Tensor, "B key_heads M width"],
    value: Float[Tensor, "B key_heads M value_width"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    segment_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B L heads value_width"], None]:
    """Return the attended values and no weights, as transformers' attention functions do.

    A packed row has `segment_lengths`, the tokens of each sample, and no mask. `is_causal` is by default the layer's
    own; `kwargs` are not used.

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
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    return attend_segments(query, key, value, segment_lengths, causal, dropout, scaling)[None], None


def packed_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Return no mask for a packed row, and sdpa's own for padded rows and cached generation."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


class WindowAttention(nn.Module):
    """The vision tower's attention, by `attend_segments`. Weights keep their place and name.

    transformers makes one call per window and layer, some 7,000 per pack. All families have the same.
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.qkv: Any = attention.qkv
        self.proj: Any = attention.proj
        self.num_heads: Any = attention.num_heads
        self.module_name = type(attention).__module__  # has the rotation; a module itself could not be copied

    def forward(
        self,
        hidden_states: Float[Tensor, "L C"],
        cu_seqlens: Int[Tensor, " ends"],
        rotary_pos_emb: Tensor | None = None,
        position_embeddings: tuple[Float[Tensor, "L width"], Float[Tensor, "L width"]] | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "L C"]:
        """Attend within the windows that `cu_seqlens` cuts `hidden_states` into."""
        assert position_embeddings is not None
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        query, key = sys.modules[self.module_name].apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        scale = query.shape[-1] ** -0.5  # torch's own differs in the last bit
        return self.proj(attend_segments(query, key, value, _lengths_of(cu_seqlens), scale=scale).flatten(1))


_recent: deque[tuple[Tensor, list[int]]] = deque(maxlen=2)  # of windows and of whole images


def _lengths_of(cu_seqlens: Tensor) -> list[int]:
    """Return the differences; all layers of a pass get the same tensors, so a GPU is waited for only once each."""
    for tensor, lengths in _recent:
        if tensor is cu_seqlens:
            return lengths
    _recent.append((cu_seqlens, cu_seqlens.diff().tolist()))
    return _recent[-1][1]


@dataclass(frozen=True)
class Segments:
    """Where the segments of a row are, and how to put those of equal length side by side."""

    groups: tuple[tuple[int, int], ...]  # (number of segments, length) for each distinct length, or run of equal ones
    order: Tensor | None  # (L,) the positions in the row, group by group; None: already so
    inverse: Tensor | None  # (L,)
    ends: Tensor  # (number of segments + 1,) int32, from 0
    longest: int


@lru_cache(maxsize=16)
def group_segments(lengths: tuple[int, ...], device: torch.device, together: bool) -> Segments:
    """Return how to attend within segments, those of equal length `together`; kept, as every layer asks the same."""
    sizes = np.array(lengths)
    starts = np.concatenate([[0], sizes.cumsum()])
    by_length = sizes.argsort(kind="stable")
    values, counts = np.unique(sizes, return_counts=True)
    order = inverse = None
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training
        if together and len(values) < len(sizes) and (by_length[1:] < by_length[:-1]).any():
            first = np.repeat(
                starts[by_length] - np.concatenate([[0], sizes[by_length].cumsum()[:-1]]), sizes[by_length]
            )
            positions = torch.from_numpy(first + np.arange(len(first)))
            order, inverse = positions.to(device), positions.argsort().to(device)
        ends = torch.from_numpy(starts.astype(np.int32)).to(device)
    if not together or len(values) == len(sizes):
        runs = tuple((len(list(run)), length) for length, run in groupby(lengths))
        return Segments(runs, None, None, ends, max(lengths))
    groups = tuple(zip(counts.tolist(), values.tolist(), strict=True))
    return Segments(groups, order, inverse, ends, max(lengths))


def attend_segments(
    query: Float[Tensor, "L heads width"],
    key: Float[Tensor, "L heads width"],
    value: Float[Tensor, "L heads value_width"],
    lengths: Sequence[int],
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Float[Tensor, "L heads value_width"]:
    """Return the attended values within consecutive segments of `lengths`, whose sum is L.

    `scale` is by default one over the root of the width.
    """
    segments = group_segments(tuple(lengths), query.device, query.device.type not in LOOPING)
    kernel = varlen_kernel()
    if kernel is not None and not dropout and fits_varlen(query):
        return attend_varlen(kernel, query, key, value, segments, causal, scale)
    rows = [query, key, value]
    if segments.order is not None:
        rows = [states.index_select(0, segments.order) for states in rows]
    parts = zip(
        *(states.split([number * length for number, length in segments.groups]) for states in rows), strict=True
    )
    attended: list[Tensor] = []
    for (number, length), part in zip(segments.groups, parts, strict=True):
        q, k, v = (states.unflatten(0, (number, length)).transpose(1, 2) for states in part)
        found = F.scaled_dot_product_attention(
            q, k, v, None, dropout, causal, scale=scale
        )  # (number, heads, length, ·)
        attended.append(found.transpose(1, 2).flatten(0, 1))
    together = torch.cat(attended) if len(attended) > 1 else attended[0]
    return together if segments.inverse is None else together.index_select(0, segments.inverse)


@cache
def varlen_kernel() -> Callable[..., Tensor] | None:
    """Return torch's attention over segments of given lengths, None before torch 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # type: ignore[import-not-found]
    except ImportError:
        return None
    return varlen_attn


def fits_varlen(query: Tensor) -> bool:
    """Return whether torch's kernel takes these states (L, heads, ·): half precision on a GPU of 2020 or later."""
    if not query.is_cuda or query.shape[-1] % 8 or torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    return (torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype) in _HALF


def attend_varlen(
    kernel: Callable[..., Tensor],
    query: Float[Tensor, "L heads width"],
    key: Float[Tensor, "L heads width"],
    value: Float[Tensor, "L heads value_width"],
    segments: Segments,
    causal: bool,
    scale: float | None,
) -> Float[Tensor, "L heads value_width"]:
    """Return what `attend_segments` does, by one call of torch's kernel; autocast does not know it."""
    width = query.shape[-1]
    if scale is not None:  # not an argument in torch 2.10, whose own is 1 / sqrt(width)
        query = query * (scale * width**0.5)
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        query, key, value = (states.to(torch.get_autocast_dtype("cuda")) for states in (query, key, value))
    how: dict[str, Any] = {"window_size": (-1, 0 if causal else -1)}  # torch 2.11 and later
    if "is_causal" in signature(kernel).parameters:
        how = {"is_causal": causal}
    ends, longest = segments.ends, segments.longest
    return kernel(query, key, value, ends, ends, longest, longest, **how)


def register() -> str:
    """Register `packed_sdpa` with transformers and return its name."""
    AttentionInterface.register(PACKED, packed_sdpa)
    AttentionMaskInterface.register(PACKED, packed_mask)
    return PACKED


def resolve_attention(attn_implementation: str) -> str:
    """Resolve `auto` to flash-attention 2 if usable, else to `packed_sdpa`; return others unchanged."""
    if attn_implementation != "auto":
        return attn_implementation
    return "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else register()


def describe_attention(attn_implementation: str) -> str:
    """Return which attention the language model and the vision tower use, and why."""
    if attn_implementation != "auto":
        windows = "" if attn_implementation == "flash_attention_2" else "; the vision tower makes one call per window"
        return f"{attn_implementation}, as model.attn_implementation says{windows}"
    if resolve_attention(attn_implementation) == "flash_attention_2":
        return "flash_attention_2, which is installed"
    sdpa = "torch's SDPA, one call for all samples or windows of equal length"
    if not torch.cuda.is_available():
        return "torch's SDPA, one call per run of samples or windows of equal length (no GPU)"
    if varlen_kernel() is None:
        return f"{sdpa}: flash-attn is not installed, and torch {torch.__version__} has no varlen_attn (2.10 has)"
    return f"torch's varlen_attn in half precision, as flash-attn is not installed; in float32 {sdpa}"
