"""Hybrid sharding on four gloo ranks, two groups of two: the numbers and checkpoints of plain FSDP and of one process.

FSDP1 runs on the CPU through `fsdp_shim.py`; there it cannot save whole checkpoints (see test_fsdp_runs.py).
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from recipe.checkpoints.weights import read_weights
from recipe.schema import Example
from tests.distributed.fsdp_run import Leg
from tests.distributed.legs import Run, assert_same, one_of, run_legs, with_drills
from tests.distributed.test_two_ranks import assert_one_process
from tests.launches.launch import run_composer

FOUR_RANKS = {
    "fsdp1": Leg("", "", "", "fsdp1"),
    "fsdp2": Leg("", "", "", "fsdp2"),
    "hybrid1": Leg("", "", "", "hybrid1"),
    "hybrid2": Leg("", "", "", "hybrid2"),
    "hybrid1_kept": Leg("", "", "", "hybrid1", kept=True),
    "hybrid2_kept": Leg("", "", "", "hybrid2", kept=True),
    "hybrid2_adapted": Leg("", "", "", "hybrid2", adapted=True, ema=True),
    "fsdp2_begun": Leg("", "", "", "fsdp2", steps=3),
    "fsdp2_begun_sharded": Leg("", "", "", "fsdp2", steps=3, sharded=True),
    "hybrid2_begun": Leg("", "", "", "hybrid2", steps=3),
    "hybrid2_begun_sharded": Leg("", "", "", "hybrid2", steps=3, sharded=True),
    "hybrid1_begun_sharded": Leg("", "", "", "hybrid1", steps=3, sharded=True),
    "hybrid2_of_hybrid2": Leg("", "", "", "hybrid2", begin_with="hybrid2_begun"),
    "hybrid2_of_fsdp2": Leg("", "", "", "hybrid2", begin_with="fsdp2_begun"),
    "fsdp2_of_hybrid2": Leg("", "", "", "fsdp2", begin_with="hybrid2_begun"),
    "ddp_of_hybrid2": Leg("", "", "", "ddp", begin_with="hybrid2_begun"),
    "hybrid1_sharded_of_hybrid1": Leg("", "", "", "hybrid1", sharded=True, begin_with="hybrid1_begun_sharded"),
    "hybrid2_sharded_of_hybrid2": Leg("", "", "", "hybrid2", sharded=True, begin_with="hybrid2_begun_sharded"),
    "hybrid2_sharded_of_fsdp2": Leg("", "", "", "hybrid2", sharded=True, begin_with="fsdp2_begun_sharded"),
    "fsdp2_sharded_of_hybrid2": Leg("", "", "", "fsdp2", sharded=True, begin_with="hybrid2_begun_sharded"),
}
ONE_RANK = {
    "one": Leg("", "", "", "ddp"),
    "one_adapted": Leg("", "", "", "ddp", adapted=True, ema=True),
    "one_of_hybrid2": Leg("", "", "", "ddp", begin_with="hybrid2_begun"),
}
WHOLE = [name for name in FOUR_RANKS if "begun" not in name and "_of_" not in name]
RESUMED = [name for name in (*FOUR_RANKS, *ONE_RANK) if "_of_" in name]
DRILLS = {*WHOLE, *RESUMED} - {"hybrid1", "hybrid2", "hybrid2_sharded_of_hybrid2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the run folders."""
    return tmp_path_factory.mktemp("hybrid")


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tiny_checkpoint: str, folder: Path) -> Mapping[str, Run]:
    return run_legs(request, tiny_checkpoint, folder, {4: FOUR_RANKS, 1: ONE_RANK}, timeout=2400)


@pytest.mark.slow
@pytest.mark.world_size(4)
@pytest.mark.parametrize("name", with_drills(WHOLE, DRILLS))
def test_five_steps_with_evaluation_are_those_of_one_process(runs: Mapping[str, Run], name: str) -> None:
    """So those of hybrid sharding are those of plain FSDP; measured: losses 8.4e-16, weights 5.2e-14."""
    assert len(runs[name].losses) == 5 and len(runs[name].scores) == 2
    expected = runs[one_of(name)]
    assert_same(runs[name], expected)
    assert runs[name].scores[0] == pytest.approx(expected.scores[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.world_size(4)
@pytest.mark.parametrize("name", with_drills(RESUMED, DRILLS))
def test_checkpoints_pass_between_hybrid_and_other_runs(runs: Mapping[str, Run], name: str) -> None:
    assert len(runs[name].losses) == 2
    assert_same(runs[name], runs["one"])
    before, _, after = name.rpartition("_of_")
    if before.removesuffix("_sharded") == after:
        whole = runs[after].weights
        assert all(torch.equal(value, whole[key]) for key, value in runs[name].weights.items())


@pytest.mark.slow
@pytest.mark.world_size(4)
@pytest.mark.parametrize(
    "name", with_drills(["hybrid1_begun_sharded", "hybrid2_begun_sharded"], drills=["hybrid1_begun_sharded"])
)
def test_one_group_writes_the_shards(runs: Mapping[str, Run], folder: Path, name: str) -> None:
    checkpoint = folder / name / "checkpoints" / "latest-rank0.pt"
    assert {path.name for path in checkpoint.resolve().glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    gathered = read_weights(checkpoint)
    assert all(torch.equal(gathered[key], value) for key, value in runs[name].weights.items())


@pytest.mark.slow
@pytest.mark.world_size(4)
@pytest.mark.parametrize("mode", with_drills(["hybrid1", "hybrid2"], drills=["hybrid1"]))
def test_a_step_is_that_of_one_process(
    tiny_checkpoint: str, tiny_examples: dict[str, Example], tmp_path: Path, mode: str
) -> None:
    """Every loss term and every gradient, also if the ranks of a group have no image or a part is frozen."""
    names = ("padded", "packed", "text_only_rank", "all_switches", "frozen_backbone", "adapted")
    script = Path(__file__).with_name("one_step.py")
    run_composer(4, script, tiny_checkpoint, str(tmp_path), mode, *names, timeout=900)
    for name in names:
        ranks = [torch.load(tmp_path / f"{mode}-{name}-{rank}.pt") for rank in range(4)]
        assert_one_process(name, ranks, tiny_checkpoint, tiny_examples)
