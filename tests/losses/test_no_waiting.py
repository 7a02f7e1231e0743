"""Matcher and losses never make a GPU wait for the host but for the one copy of the cost matrix."""

from typing import Any

import pytest
import torch
from loss_cases import COUNTS, random_outputs, random_targets
from torch import Tensor

from recipe.config import LossConfig
from recipe.losses.terms import caption_loss, denoising_losses, detection_losses
from recipe.models.detection_head import make_denoising_queries
from recipe.models.matcher import match
from recipe.models.token_losses import token_losses
from tests.support.waits import Waits


def test_the_counter_sees_masks_and_items():
    with Waits() as waits:
        values = torch.arange(4.0)
        _ = values[values > 1], values[0].item(), (values > 1).nonzero()
    assert {"index", "_local_scalar_dense", "nonzero"} <= waits.seen.keys()


@pytest.mark.parametrize("objectness", ["focal", "mal"])
def test_one_copy_a_step(objectness: str, monkeypatch: pytest.MonkeyPatch):
    """Forward and backward, with images without objects, without annotation, and with more objects than queries."""
    copies: list[torch.Size] = []
    to_host = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: copies.append(self.shape) or to_host(self))
    blocking: list[tuple[torch.Size, object]] = []
    to = Tensor.to

    def recorded(tensor: Tensor, *others: Any, **keywords: Any) -> Tensor:
        if isinstance(others[0], torch.device) and not keywords.get("non_blocking"):
            blocking.append((tensor.shape, others[0]))
        return to(tensor, *others, **keywords)

    monkeypatch.setattr(Tensor, "to", recorded)
    outputs, config = random_outputs(4, 5, seed=0, num_layers=2), LossConfig(objectness=objectness)
    targets = random_targets([3, 0, None, 7], seed=1)
    queries = make_denoising_queries(targets, [1, 2, 3, 4], 2, 1.0)
    assert queries is not None
    denoised = random_outputs(4, len(queries), seed=2, num_layers=2)
    states, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    labels, images = torch.arange(6), torch.tensor([0, 0, 0, 3, 3, 3])
    with Waits() as waits:
        matches = match([layer for _, layer in outputs.layers()], targets, 5.0, 2.0, 2.0)
        terms = detection_losses(outputs, matches, targets, COUNTS, config)
        terms |= denoising_losses((queries, denoised), outputs, COUNTS, config)
        terms["loss_caption"] = caption_loss(token_losses(states, weight, labels, 4), images, 4, COUNTS)
        torch.stack([term.double() for term in terms.values()]).sum().backward()
    assert not waits.seen, waits.seen
    assert copies == [(2, 4, 5, 7)]
    assert not blocking, blocking  # what is made on the host goes to the device without being waited for
