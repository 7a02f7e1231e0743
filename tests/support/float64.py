"""Lets transformers' Qwen2.5-VL compute in float64 where its weights are float64."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen


def compute_in_float64() -> None:
    """For the two parts that take float64 for float32: RMS norms and the vision tower's rotation.

    Where a gradient is rounded to float32, one that another order of summing moves by 1e-16 can land 6e-8 away; after
    some steps such a run cannot be told from a wrong one.
    """
    (norm,) = {value for name, value in vars(qwen).items() if name.endswith("RMSNorm")}
    norm_as_released, rotate_as_released = norm.forward, qwen.apply_rotary_pos_emb_vision

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float64:
            return norm_as_released(self, hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if q.dtype != torch.float64:
            return rotate_as_released(q, k, cos, sin)
        cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)
        return q * cos + qwen.rotate_half(q) * sin, k * cos + qwen.rotate_half(k) * sin

    norm.forward, qwen.apply_rotary_pos_emb_vision = forward, rotate
