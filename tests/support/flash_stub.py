"""Replace the `flash_attn` package by plain torch, for tests on CPU: the same functions, every call noted.

It changes transformers for the whole process, so it belongs in a process of its own.
"""

import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import modeling_flash_attention_utils, modeling_utils


@dataclass(frozen=True)
class Call:
    """What one call of flash-attention was given; a dense one has the length of each row in `cu_seqlens`."""

    is_varlen: bool
    causal: bool
    heads: int
    cu_seqlens: list[int]
    cu_seqlens_dtypes: list[str]
    max_seqlen_types: list[str]
    max_seqlens: list[int]


def install() -> list[Call]:
    """Make `flash_attention_2` run on CPU; return the list in which its calls will be noted."""
    calls: list[Call] = []

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, causal: bool = False, **kwargs: Any
    ) -> Tensor:
        assert not any(kwargs.get(name) for name in ("dropout_p", "softcap", "alibi_slopes")), kwargs
        calls.append(Call(False, causal, q.shape[2], [q.shape[1]] * len(q), [], [], []))
        return torch.stack([_attend(*row, causal, softmax_scale) for row in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> Tensor:
        assert (dropout_p, window_size, softcap, alibi_slopes) == (0.0, (-1, -1), 0.0, None)
        both = (cu_seqlens_q, cu_seqlens_k)
        longest = (max_seqlen_q, max_seqlen_k)
        calls.append(
            Call(
                True,
                causal,
                q.shape[1],
                cu_seqlens_q.tolist(),
                [str(ends.dtype) for ends in both],
                [type(length).__name__ for length in longest],
                [int(length) for length in longest],
            )
        )
        lengths_q, lengths_k = (ends.diff().tolist() for ends in both)
        assert sum(lengths_q) == len(q) and sum(lengths_k) == len(k) == len(v)
        parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
        return torch.cat([_attend(*part, causal, softmax_scale) for part in parts])

    package = ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)
    vars(package).update(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    padding = ModuleType("flash_attn.bert_padding")
    vars(padding).update(
        pad_input=modeling_flash_attention_utils._pad_input, unpad_input=modeling_flash_attention_utils._unpad_input
    )
    sys.modules |= {"flash_attn": package, "flash_attn.bert_padding": padding}
    for module in (modeling_flash_attention_utils, modeling_utils):
        vars(module)["is_flash_attn_2_available"] = lambda: True
    return calls


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """Attend in a sequence: (q, heads, ·), (k, key heads, ·) twice.

    Causal attention counts from the ends of both, as flash-attention does.
    """
    repeats = q.shape[1] // k.shape[1]
    query = q.transpose(0, 1)
    key, value = (states.transpose(0, 1).repeat_interleave(repeats, dim=0) for states in (k, v))
    mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q)) if causal else None
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(0, 1)
