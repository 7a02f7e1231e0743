"""Measure time and memory of each way of attention over segments, and of the language model's loss."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

import lm_loss
from recipe.estimate import GIB
from recipe.models import attention as product
from recipe.models.attention import attend_segments
from tests.gpu.session import Session, rounded

Attend = Callable[..., Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# {name: (lengths, heads, width, causal)} at the sizes of the 3B: windows of 64 patches with those at the edge of four
# images, four whole images, samples of a pack.
SHAPES: dict[str, tuple[list[int], int, int, bool]] = {
    "windows": ([64] * 220 + [32] * 60 + [16] * 12, 16, 80, False),
    "images": ([4096, 3600, 4096, 4096], 16, 80, False),
    "samples": ([1550, 400, 900, 610, 1130, 730, 1280, 1420], 16, 128, True),
}
SMALL: dict[str, tuple[list[int], int, int, bool]] = {
    "windows": ([16] * 6 + [8] * 3, 2, 16, False),
    "samples": ([15, 40, 9], 2, 16, True),
}


def by_segment(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], causal: bool) -> Tensor:
    """Return attention (L, heads, width) with one call of torch's SDPA per segment."""
    parts = zip(*(states.split(list(lengths)) for states in (query, key, value)), strict=True)
    heads = ([states.transpose(0, 1)[None] for states in part] for part in parts)
    return torch.cat([F.scaled_dot_product_attention(*part, is_causal=causal)[0].transpose(0, 1) for part in heads])


def grouped(*arguments: Any) -> Tensor:
    """Return what `attend_segments` does with one call for all segments of equal length, without torch's varlen."""
    with patch.object(product, "varlen_kernel", lambda: None), patch.object(product, "LOOPING", ()):
        return attend_segments(*arguments)


def ways_of(device: str) -> dict[str, Attend]:
    """Return the ways to attend that there are on a device, the product's own among them."""
    ways: dict[str, Attend] = {"by_segment": by_segment, "grouped": grouped}
    if device == "cuda" and product.varlen_kernel() is not None:
        ways["varlen"] = attend_segments
    return ways


def gradients(way: Attend, states: Sequence[Tensor], lengths: Sequence[int], causal: bool) -> list[Tensor]:
    """Return the attended rows and the gradients of queries, keys and values for a fixed weight of each number."""
    inputs = [tensor.detach().requires_grad_() for tensor in states]
    attended = way(*inputs, lengths, causal)
    weights = torch.linspace(-1, 1, attended.numel(), device=attended.device, dtype=torch.float64)
    attended.backward(weights.view_as(attended).to(attended.dtype))
    return [attended.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest norm of a difference, in norms of what is expected."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def random_states(device: str, lengths: Sequence[int], heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Return queries, keys and values (L, heads, width)."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(sum(lengths), heads, width, generator=generator) for _ in range(3)]
    return [tensor.to(device, dtype) for tensor in made]


def attention(session: Session) -> None:
    """Time forward and backward of each way in bfloat16; the errors are next to one call per segment in float64."""
    for name, (lengths, heads, width, causal) in (SHAPES if session.is_cuda else SMALL).items():
        states = random_states(session.device, lengths, heads, width, torch.bfloat16)
        expected = gradients(by_segment, [tensor.double() for tensor in states], lengths, causal)
        figures: dict[str, Any] = {"segments": len(lengths), "rows": sum(lengths)}
        for way, attend in ways_of(session.device).items():
            error = largest_error(gradients(attend, states, lengths, causal), expected)
            work = partial(gradients, attend, states, lengths, causal)
            figures |= {f"{way}_ms": rounded(1e3 * session.seconds(work)), f"{way}_error": rounded(error, 2)}
        session.report(f"attention {name}", **figures)


def losses(session: Session) -> None:
    """Report time and extra memory of the loss in chunks, of full logits, and of liger's kernel if it is there."""
    sizes = (4096, 2048, 151936) if session.is_cuda else (128, 32, 1024)
    for case in ("bfloat16 trained", "bfloat16 frozen", "float32 trained"):
        kinds: dict[str, Loss] = dict(lm_loss.KINDS)
        if session.is_cuda and find_spec("liger_kernel"):
            kinds["liger"] = liger
        for kind, loss in kinds.items():
            states, weight, labels = make_loss(session.device, case, *sizes)
            work = partial(loss_step, loss, states, weight, labels)
            seconds = session.seconds(work)
            states.grad = weight.grad = None
            peak = session.peak_bytes(work)
            kept = sum(tensor.grad.nbytes for tensor in (states, weight) if tensor.grad is not None)
            extra = None if peak is None else rounded((peak - kept) / GIB)
            session.report(f"loss {case} {kind}", ms=rounded(1e3 * seconds), extra_gib=extra)
    if not find_spec("liger_kernel"):
        session.not_run("loss liger", "liger-kernel is absent")


def loss_step(loss: Loss, states: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Run forward and backward from no gradients."""
    states.grad = weight.grad = None
    loss(states, weight, labels).sum().backward()


def liger(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the losses by liger's kernel; it has them by token too, but then without gradients."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, states, labels)


def make_loss(device: str, case: str, positions: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return states, output matrix and labels of one case of `lm_loss.py`."""
    dtype, trained = case.split()
    made = [torch.empty(n, width, device=device, dtype=getattr(torch, dtype)) for n in (positions, vocabulary)]
    states, weight = (tensor.normal_(0, 0.02) for tensor in made)
    labels = torch.randint(0, vocabulary, (positions,), device=device)
    return states.requires_grad_(), weight.requires_grad_(trained == "trained"), labels
