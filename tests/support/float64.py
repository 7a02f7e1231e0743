"""Let transformers' models compute in float64 if their weights are float64."""

import sys
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from recipe.families import FAMILIES


def compute_in_float64() -> None:
    """Replace the two parts that treat float64 as float32: RMS norms and the vision tower's rotation.

    If a gradient is rounded to float32, one that another order of summing moves by 1e-16 can land 6e-8 away. After some
    steps such a run cannot be distinguished from a wrong one.
    """
    modules = [sys.modules[getattr(transformers, family.base).__module__] for family in FAMILIES.values()]
    for norm in {value for module in modules for name, value in vars(module).items() if name.endswith("RMSNorm")}:
        _norm_in_float64(norm)
    for module in modules:
        _rotate_in_float64(module)


def _norm_in_float64(norm: type[nn.Module]) -> None:
    as_released = norm.forward

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float64:
            return as_released(self, hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    norm.forward = forward


def _rotate_in_float64(module: Any) -> None:
    as_released = module.apply_rotary_pos_emb_vision

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if q.dtype != torch.float64:
            return as_released(q, k, cos, sin)
        cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)
        return q * cos + module.rotate_half(q) * sin, k * cos + module.rotate_half(k) * sin

    module.apply_rotary_pos_emb_vision = rotate
