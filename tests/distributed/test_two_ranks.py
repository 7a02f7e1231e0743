"""Two gloo ranks under Composer's Trainer are one process: every loss term and every gradient."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recipe.config import RecipeConfig
from recipe.schema import Example
from tests.distributed.one_step import CASES
from tests.launch import run_composer
from tests.tiny_cases import gradient_error, loss_error, losses_and_gradients, make_batches, make_model


@pytest.fixture(scope="module")
def records(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What both ranks wrote, of each case; a rank that waits for the other runs into the time limit."""
    out = tmp_path_factory.mktemp("two_ranks")
    script = Path(__file__).with_name("one_step.py")
    run_composer(2, script, tiny_checkpoint, str(out), timeout=240)
    return {name: [torch.load(out / f"{name}-{rank}.pt") for rank in range(2)] for name in CASES}


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process(
    records: dict[str, list[dict[str, Any]]],
    tiny_config: Callable[..., RecipeConfig],
    tiny_examples: dict[str, Example],
    name: str,
):
    case, (first, second) = CASES[name], records[name]
    together = [tiny_examples[sample] for share in case.shares for sample in share]
    # A model of its own: Composer's seed and wrapping are not to touch it.
    expected, gradients = losses_and_gradients(make_model(tiny_config()), make_batches(together, "standard", 8))
    num_microbatches = sum(-(-len(share) // case.microbatch_size) for share in case.shares)
    losses = {key: (first["losses"][key] + second["losses"][key]) / num_microbatches for key in expected}
    # measured: 7.5e-16 and 9.5e-16
    assert loss_error(losses, expected) <= 1e-9
    assert gradient_error(first["gradients"], gradients) <= 1e-9
    assert gradient_error(second["gradients"], gradients) <= 1e-9
    for key, value in expected.items():
        assert first["logged"][f"loss/train/{key}"] == pytest.approx(float(value), rel=1e-6)
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["weights"])
