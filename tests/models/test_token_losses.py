"""Losses in chunks: by hand, against full logits, with nothing supervised, under autocast, and what they keep."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from recipe.models.token_losses import token_losses


def make(positions: int, vocabulary: int = 23, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(positions)
    states, weight = (torch.randn(n, 6, generator=generator, dtype=dtype) for n in (positions, vocabulary))
    labels = torch.randint(0, vocabulary, (positions,), generator=generator)
    return states.requires_grad_(), weight.requires_grad_(), labels


def with_full_logits(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(
        (states @ weight.T).to(torch.promote_types(states.dtype, torch.float32)), labels, reduction="none"
    )


def test_by_hand():
    """Logits (0, ln 3), label 1: probabilities 1/4 and 3/4, loss ln 4/3, gradient of the logits (1/4, -1/4)."""
    states = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0, 5.0], [math.log(3), 7.0]], dtype=torch.float64, requires_grad=True)
    losses = token_losses(states, weight, torch.tensor([1]))
    assert losses.tolist() == pytest.approx([math.log(4 / 3)])
    (2 * losses).sum().backward()
    assert states.grad is not None and weight.grad is not None
    assert states.grad.tolist()[0] == pytest.approx([-0.5 * math.log(3), 0.5 * (5 - 7)])
    assert weight.grad.flatten().tolist() == pytest.approx([0.5, 0, -0.5, 0])


@pytest.mark.parametrize("positions", [1, 7, 12])
@pytest.mark.parametrize("chunk", [1, 3, 5, 12, 100])
def test_equal_to_full_logits(positions: int, chunk: int):
    """Losses and gradients, each position with its own weight in the sum; chunks need not divide the positions."""
    states, weight, labels = make(positions)
    of_each = torch.linspace(-1, 2, positions, dtype=torch.float64)
    expected = with_full_logits(states, weight, labels)
    found = token_losses(states, weight, labels, chunk)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad((found * of_each).sum(), (states, weight)),
        torch.autograd.grad((expected * of_each).sum(), (states, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)  # measured: 2e-15


@pytest.mark.parametrize("frozen", ["states", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(frozen: str):
    states, weight, labels = make(7)
    learned, kept = (weight, states) if frozen == "states" else (states, weight)
    kept.requires_grad_(False)
    of_each = torch.linspace(-1, 2, 7, dtype=torch.float64)
    (found,) = torch.autograd.grad((token_losses(states, weight, labels, 3) * of_each).sum(), learned)
    (expected,) = torch.autograd.grad((with_full_logits(states, weight, labels) * of_each).sum(), learned)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_tied_matrix_gets_both_gradients():
    """The token embedding reads the same weights."""
    _, weight, labels = make(7)
    found, expected = (
        torch.autograd.grad(loss(F.embedding(labels.flip(0), weight), weight, labels).sum(), weight)
        for loss in (token_losses, with_full_logits)
    )
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-12)


def test_nothing_supervised_has_a_gradient_of_zeros():
    """Ranks whose batch has no answer take part in the sum of the gradients."""
    states, weight, labels = make(0)
    losses = token_losses(states, weight, labels)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert states.grad is not None and states.grad.shape == states.shape
    assert weight.grad is not None and not weight.grad.any()


def test_autocast_computes_in_bfloat16_and_returns_gradients_as_stored():
    states, weight, labels = make(40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_losses(states, weight, labels, 16)
        expected = with_full_logits(states, weight, labels)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    gradients = torch.autograd.grad(found.sum(), (states, weight))
    of_full = torch.autograd.grad(expected.sum(), (states, weight))
    for one, other in zip(gradients, of_full, strict=True):
        assert one.dtype == torch.float32
        # bfloat16 has 8 bits; the weight's gradient is rounded once a chunk. measured: 0.004
        assert float((one - other).norm() / other.norm()) < 0.01


def test_no_logits_are_kept_for_the_backward_pass():
    states, weight, labels = make(64, vocabulary=100)
    losses = token_losses(states, weight, labels, 8)
    kept = sum(tensor.numel() for tensor in losses.grad_fn.saved_tensors)  # pyright: ignore
    assert kept == states.numel() + weight.numel() + labels.numel() < losses.numel() * 100
    losses = token_losses(states, weight.detach(), labels, 8)
    assert [tensor.shape for tensor in losses.grad_fn.saved_tensors] == [states.shape]  # pyright: ignore


@pytest.mark.parametrize("trained", [True, False])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(trained: bool):
    """Forward and backward; but for states, matrix and gradients, of 64 x 6 and 100 x 6."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            self.numel = max(self.numel, result.numel() if isinstance(result, Tensor) else 0)
            return result

    states, weight, labels = make(64, vocabulary=100)
    with Largest() as largest:
        token_losses(states, weight.requires_grad_(trained), labels, 8).sum().backward()
    assert largest.numel == 8 * 100
    with Largest() as largest:
        with_full_logits(states, weight, labels).sum().backward()
    assert largest.numel == 64 * 100
