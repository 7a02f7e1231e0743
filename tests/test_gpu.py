"""What only a GPU can show; run with `pytest -m gpu` where there is one."""

from collections.abc import Callable

import pytest
import torch
from composer.utils import get_device

from recipe.config import RecipeConfig
from recipe.data.collate import collate_packed, collate_standard, one_each
from recipe.losses.counts import split_batch
from recipe.models.attention import register
from recipe.schema import Batch, Example
from tests.support.tiny_cases import make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def total(config: RecipeConfig, batch: Batch, device_name: str) -> torch.Tensor:
    device = get_device(device_name)
    model = device.module_to_device(make_model(config))
    batch = device.batch_to_device(split_batch([batch], len(batch["samples"]))[0])
    loss = model.loss(model(batch), batch)["total"]
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return loss.detach().cpu()


@pytest.mark.parametrize("collator", ["standard", "packed"])
def test_gpu_gives_the_loss_of_the_cpu(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example], collator: str
) -> None:
    examples = list(tiny_examples.values())
    batch = (
        collate_packed(one_each(examples))
        if collator == "packed"
        else collate_standard(one_each(examples), pad_token_id=0)
    )
    # Not `auto`: flash-attention takes half precision only.
    config = tiny_config(model={"attn_implementation": register()})
    torch.testing.assert_close(total(config, batch, "gpu"), total(config, batch, "cpu"), rtol=1e-9, atol=0)
