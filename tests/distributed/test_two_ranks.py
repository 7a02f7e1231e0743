"""Two gloo ranks under Composer's Trainer are one process: every loss term and every gradient, in DDP, FSDP1, FSDP2."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recipe.models.retention import divergence_from_base
from recipe.optim.groups import build_optimizer
from recipe.schema import Example
from tests.distributed.one_step import CASES, cases_of, make_case_model
from tests.launches.launch import run_composer
from tests.support.tiny_cases import (
    OTHER_FAMILIES,
    collator,
    gradient_error,
    loss_error,
    losses_and_gradients,
    make_batches,
)

Records = Callable[[str], dict[str, list[dict[str, Any]]]]
MODES = ("ddp", "fsdp1", "fsdp2")


@pytest.fixture(scope="module")
def records(made: dict[Any, Any], tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Records:
    """What both ranks wrote, of each case of a mode; a rank that waits for the other runs into the time limit."""

    def of_mode(mode: str) -> dict[str, list[dict[str, Any]]]:
        if ("two_ranks", mode) not in made:
            out = tmp_path_factory.mktemp(mode)
            script = Path(__file__).with_name("one_step.py")
            run_composer(2, script, tiny_checkpoint, str(out), mode, timeout=600)
            made["two_ranks", mode] = {
                name: [torch.load(out / f"{mode}-{name}-{rank}.pt") for rank in range(2)] for name in cases_of(mode)
            }
        return made["two_ranks", mode]

    return of_mode


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize(("mode", "name"), [(mode, name) for mode in MODES for name in cases_of(mode)])
def test_two_ranks_are_one_process(
    records: Records, tiny_checkpoint: str, tiny_examples: dict[str, Example], mode: str, name: str
):
    assert_one_process(name, records(mode)[name], tiny_checkpoint, tiny_examples)


@pytest.mark.slow
@pytest.mark.world_size(2)
@OTHER_FAMILIES
def test_other_families(tiny_checkpoint: str, tiny_examples: dict[str, Example], tmp_path: Path):
    """Under FSDP2: the vision tower runs on a blank image in one rank, and its early features reach no token there."""
    names, script = ("packed", "text_only_rank", "adapted"), Path(__file__).with_name("one_step.py")
    run_composer(2, script, tiny_checkpoint, str(tmp_path), "fsdp2", *names, timeout=600)
    for name in names:
        ranks = [torch.load(tmp_path / f"fsdp2-{name}-{rank}.pt") for rank in range(2)]
        assert_one_process(name, ranks, tiny_checkpoint, tiny_examples)


def assert_one_process(
    name: str, ranks: list[dict[str, Any]], tiny_checkpoint: str, tiny_examples: dict[str, Example]
) -> None:
    """The ranks' losses, gradients and weights after the step are those of one process."""
    case, first = CASES[name], ranks[0]
    together = [tiny_examples[sample] for share in case.shares for sample in share]
    # A model of its own: Composer's seed and wrapping are not to touch it.
    model = make_case_model(case, tiny_checkpoint)
    build_optimizer(model, case.optimizer)  # freezes
    expected, gradients = losses_and_gradients(model, make_batches(together, "standard", 8))
    num_microbatches = sum(-(-len(share) // case.microbatch_size) for share in case.shares_of(len(ranks)))
    losses = {key: torch.stack([rank["losses"][key] for rank in ranks]).sum() / num_microbatches for key in expected}
    # measured at worst: 7.4e-16 (DDP; FSDP 5.9e-16) and 9.9e-16 (DDP; FSDP 9.1e-16)
    assert loss_error(losses, expected) <= 1e-9
    for rank in ranks:
        assert gradient_error(rank["gradients"], gradients) <= 1e-9
        assert all(torch.equal(rank["weights"][key], value) for key, value in first["weights"].items())
    for key, value in expected.items():
        assert first["logged"][f"loss/train/{key}"] == pytest.approx(float(value), rel=1e-6)


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["adapted", "adapted_text_only_rank"])
def test_the_divergence_from_the_base(
    records: Records, tiny_checkpoint: str, tiny_examples: dict[str, Example], mode: str, name: str
):
    """Each rank's answers, by sharded weights after a step, as one process computes them by the same weights."""
    case, ranks = CASES[name], records(mode)[name]
    network = make_case_model(case, tiny_checkpoint).eval().model
    weights = {key.removeprefix("model."): value for key, value in ranks[0]["weights"].items()}
    network.load_state_dict(weights, strict=False)
    for share, record in zip(case.shares, ranks, strict=True):
        samples = [tiny_examples[sample] for sample in share[: case.microbatch_size]]
        expected = divergence_from_base(network, collator("packed")(samples))
        torch.testing.assert_close(record["moved"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize("mode", MODES)
def test_weights_changed_after_an_evaluation_are_seen(records: Records, mode: str):
    for record in records(mode)["padded"]:
        assert record["blind"].numel() and record["blind"].tolist() == pytest.approx([0.0] * len(record["blind"]))
