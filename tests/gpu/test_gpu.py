"""Check what only a GPU can show; run with `pytest -m gpu` if there is one."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from composer.utils import get_device

from recipe.config import RecipeConfig
from recipe.data.collate import collate_packed, collate_standard, one_each
from recipe.joint import JointModel
from recipe.losses.counts import split_batch
from recipe.models.attention import attend_segments, fits_varlen, register, varlen_kernel
from recipe.schema import Batch, Example
from tests.gpu.ways import by_segment, gradients, grouped, largest_error, random_states
from tests.support.tiny_cases import gradient_error, loss_error, losses_and_gradients, make_batches, make_model
from tests.test_exactness import by_sample, largest_change, with_other_content

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# A whole image, windows with cut ones, samples of a pack; one of a single token.
SEGMENTS = {"windows": ([64, 64, 16, 64, 32, 16, 1], False), "samples": ([1, 130, 40, 400, 257], True)}


def on_gpu(batch: Any) -> Any:
    return get_device("gpu").batch_to_device(batch)


def gpu_model(config: RecipeConfig) -> JointModel:
    return get_device("gpu").module_to_device(make_model(config))


def total(config: RecipeConfig, batch: Batch, device_name: str) -> torch.Tensor:
    device = get_device(device_name)
    model = device.module_to_device(make_model(config))
    batch = device.batch_to_device(split_batch([batch], len(batch["samples"]))[0])
    loss = model.loss(model(batch), batch)["total"]
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return loss.detach().cpu()


@pytest.fixture
def exact(tiny_config: Callable[..., RecipeConfig]) -> RecipeConfig:
    """Return a float64 run. Not attention `auto`: flash-attention takes half precision only."""
    return tiny_config(model={"attn_implementation": register()})


@pytest.mark.parametrize("collator", ["standard", "packed"])
def test_gpu_gives_the_loss_of_the_cpu(exact: RecipeConfig, tiny_examples: dict[str, Example], collator: str) -> None:
    examples = list(tiny_examples.values())
    batch = (
        collate_packed(one_each(examples))
        if collator == "packed"
        else collate_standard(one_each(examples), pad_token_id=0)
    )
    torch.testing.assert_close(total(exact, batch, "gpu"), total(exact, batch, "cpu"), rtol=1e-9, atol=0)


def test_packed_is_padded_is_alone(exact: RecipeConfig, tiny_examples: dict[str, Example]) -> None:
    """Every loss term and every gradient in float64."""
    model, examples = gpu_model(exact), list(tiny_examples.values())
    losses, found = losses_and_gradients(model, on_gpu(make_batches(examples, "standard", 1)))
    for layout, size in (("packed", len(examples)), ("standard", len(examples)), ("packed", 2)):
        others, gradient = losses_and_gradients(model, on_gpu(make_batches(examples, layout, size)))
        assert loss_error(others, losses) <= 1e-9, (layout, size)
        assert gradient_error(gradient, found) <= 1e-9, (layout, size)


def changes(model: JointModel, examples: dict[str, Example], precision: torch.dtype) -> list[tuple[bool, float]]:
    """Change one sample's content after the other; return whether a sample is the changed one, and its change."""

    def run(batch: Batch) -> Any:
        with torch.autocast("cuda", precision, enabled=precision != torch.float64):
            return model(on_gpu(batch))

    found: list[tuple[bool, float]] = []
    with torch.no_grad():
        before = by_sample(run, examples, "packed")  # pyright: ignore[reportArgumentType]
        for changed in examples:
            after = by_sample(run, {**examples, changed: with_other_content(examples[changed])}, "packed")  # pyright: ignore[reportArgumentType]
            found += [(name == changed, largest_change(before[name], after[name])) for name in examples]
    return found


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_nothing_leaks_between_samples(
    exact: RecipeConfig, tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example], precision: str
) -> None:
    """In bfloat16 by the attention that `auto` chooses: torch's varlen, or flash-attention."""
    config = exact if precision == "float64" else tiny_config(model={"dtype": "float32"})
    # Which of its too many objects are captioned depends on the content.
    examples = {name: example for name, example in tiny_examples.items() if name != "crowded"}
    found = changes(gpu_model(config), examples, getattr(torch, precision))
    assert max(change for own, change in found if not own) <= (1e-12 if precision == "float64" else 1e-4)
    assert min(change for own, change in found if own) > 0.1


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_grouped_attention_is_one_call_per_segment(segments: tuple[Sequence[int], bool]) -> None:
    states = random_states("cuda", segments[0], 4, 80, torch.float64)
    expected = gradients(by_segment, states, *segments)
    assert largest_error(gradients(grouped, states, *segments), expected) <= 1e-12
    assert largest_error(gradients(attend_segments, states, *segments), expected) <= 1e-12


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("width", [80, 128])
def test_varlen_attention_is_one_call_per_segment(segments: tuple[Sequence[int], bool], width: int) -> None:
    """In bfloat16, next to float64; what rounding alone costs is seen in torch's own SDPA."""
    states = random_states("cuda", segments[0], 4, width, torch.bfloat16)
    if varlen_kernel() is None or not fits_varlen(states[0]):
        pytest.skip("torch has no varlen_attn, or this GPU cannot run it")
    expected = gradients(by_segment, [tensor.double() for tensor in states], *segments)
    rounding = largest_error(gradients(by_segment, states, *segments), expected)
    assert largest_error(gradients(attend_segments, states, *segments), expected) <= max(2 * rounding, 5e-3)
