"""Cross-entropy of the language model's output matrix, in chunks: the logits of all positions never exist at once.

At 4,096 positions and 152,000 tokens the logits and what autograd keeps of them take 6 GB in float32. Here only the
states, the labels and the losses are kept; the backward pass computes each chunk's logits again, which costs about what
reading and writing all of them does (tests/benchmarks/lm_loss.py; figures in RESULTS.md there). If the matrix is
frozen, the forward pass computes the gradients of the states, and nothing is computed again.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK = 256  # positions; a chunk's logits in float32 take 156 MB at 152,000 tokens


def token_losses(
    states: Float[Tensor, "K D"], weight: Float[Tensor, "V D"], labels: Int64[Tensor, " K"], chunk: int = CHUNK
) -> Float[Tensor, " K"]:
    """Return the cross-entropy of each position, float32 at least.

    Args:
        states: Of the supervised positions only; K may be 0.
        weight: A Parameter or, under FSDP, as gathered in the forward pass.
        labels: In [0, V).
        chunk: Positions whose logits exist at the same time.
    """
    device = states.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        # Cast here, in the graph: autocast would reuse a copy without gradient.
        weight = weight.to(torch.get_autocast_dtype(device))
    return _TokenLosses.apply(states.to(weight.dtype), weight, labels, chunk)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def token_divergences(
    states: Float[Tensor, "K D"],
    weight: Float[Tensor, "V D"],
    base_states: Float[Tensor, "K D"],
    base_weight: Float[Tensor, "V D"],
    labels: Int64[Tensor, " K"],
    chunk: int = CHUNK // 4,
) -> Float[Tensor, "3 K"]:
    """Return KL(base || model) over the whole vocabulary, the model's loss and the base's, per position.

    Float32 at least, without gradient. The arguments are as in `token_losses`; a chunk keeps its logits a few times.
    """
    device = states.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        weight, base_weight = weight.to(dtype), base_weight.to(dtype)
    found = states.new_empty(3, len(states), dtype=torch.promote_types(weight.dtype, torch.float32))
    with torch.autocast(device, enabled=False):
        for start in range(0, len(states), chunk):
            rows = slice(start, start + chunk)
            model, base = (
                (part[rows].to(matrix.dtype) @ matrix.T).to(found.dtype).log_softmax(dim=-1)
                for part, matrix in ((states, weight), (base_states, base_weight))
            )
            found[0, rows] = F.kl_div(model, base, reduction="none", log_target=True).sum(dim=-1)
            found[1, rows] = F.nll_loss(model, labels[rows], reduction="none")
            found[2, rows] = F.nll_loss(base, labels[rows], reduction="none")
    return found


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        ctx.chunk = chunk
        # Of a frozen matrix each position's gradient is known here, up to the factor that the backward pass brings.
        is_known = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        of_states = torch.empty_like(states) if is_known else None
        losses = states.new_empty(len(states), dtype=torch.promote_types(states.dtype, torch.float32))
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, len(states), chunk):
                rows = slice(start, start + chunk)
                logits = (states[rows] @ weight.T).to(losses.dtype)
                losses[rows] = F.cross_entropy(logits, labels[rows], reduction="none")
                if of_states is not None:
                    of_states[rows] = _gradient_of_logits(logits, labels[rows]).to(weight.dtype) @ weight
        ctx.save_for_backward(*((states, weight, labels) if of_states is None else (of_states,)))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if len(ctx.saved_tensors) == 1:
            (of_states,) = ctx.saved_tensors
            return of_states * gradient[:, None].to(of_states.dtype), None, None, None
        states, weight, labels = ctx.saved_tensors
        of_states, of_weight = torch.empty_like(states), torch.zeros_like(weight)
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, len(states), ctx.chunk):
                rows = slice(start, start + ctx.chunk)
                logits = (states[rows] @ weight.T).to(gradient.dtype)
                of_logits = _gradient_of_logits(logits, labels[rows]).mul_(gradient[rows, None]).to(weight.dtype)
                of_states[rows] = of_logits @ weight
                torch.addmm(of_weight, of_logits.T, states[rows], out=of_weight)
        return of_states, of_weight, None, None


def _gradient_of_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Turn logits (K, V) into the gradient of each row's cross-entropy, softmax - one-hot, in place."""
    torch.softmax(logits, dim=-1, out=logits)
    return logits.scatter_add_(1, labels[:, None], -torch.ones_like(logits[:, :1]))
