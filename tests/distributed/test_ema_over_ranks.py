"""The average of the head over two ranks, in DDP, FSDP1 and FSDP2, is that of one process, and so are its checkpoints.

FSDP1 on the CPU saves no whole checkpoints; see `test_fsdp_runs.py`.
"""

from collections.abc import Mapping

import pytest
import torch

from tests.distributed.fsdp_run import Leg
from tests.distributed.legs import Run, assert_same, run_legs, whole_run, with_drills

TWO_RANKS = {
    "ddp": Leg("", "", "", "ddp"),
    "fsdp1": Leg("", "", "", "fsdp1"),
    "fsdp2": Leg("", "", "", "fsdp2"),
    "fsdp1_kept": Leg("", "", "", "fsdp1", kept=True),
    "fsdp2_kept": Leg("", "", "", "fsdp2", kept=True),
    "fsdp1_begun": Leg("", "", "", "fsdp1", steps=3, sharded=True),
    "fsdp2_begun": Leg("", "", "", "fsdp2", steps=3),
    "fsdp2_begun_sharded": Leg("", "", "", "fsdp2", steps=3, sharded=True),
    "fsdp2_of_fsdp2": Leg("", "", "", "fsdp2", begin_with="fsdp2_begun"),
    "ddp_of_fsdp2": Leg("", "", "", "ddp", begin_with="fsdp2_begun"),
    "fsdp2_sharded": Leg("", "", "", "fsdp2", sharded=True, begin_with="fsdp2_begun_sharded"),
    "fsdp1_sharded": Leg("", "", "", "fsdp1", sharded=True, begin_with="fsdp1_begun"),
}
ONE_RANK = {"one": Leg("", "", "", "ddp"), "one_fsdp2": Leg("", "", "", "fsdp2")}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Run]:
    folder = tmp_path_factory.mktemp("ema_runs")
    return run_legs(request, tiny_checkpoint, folder, {2: TWO_RANKS, 1: ONE_RANK}, ema=True)


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "name", with_drills(["ddp", "fsdp1", "fsdp2", "fsdp1_kept", "fsdp2_kept", "one_fsdp2"], drills=["fsdp1"])
)
def test_weights_averages_and_evaluations_are_those_of_one_process(runs: Mapping[str, Run], name: str) -> None:
    assert_same(runs[name], runs["one"])
    averages = {key: value for key, value in runs[name].weights.items() if ".average." in key}
    assert averages
    assert any(
        not torch.equal(value, runs[name].weights[key.replace(".average.", ".")]) for key, value in averages.items()
    )


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "name",
    with_drills(
        ["fsdp2_of_fsdp2", "fsdp2_sharded", "fsdp1_sharded", "ddp_of_fsdp2"],
        drills=["fsdp2_sharded", "fsdp1_sharded", "ddp_of_fsdp2"],
    ),
)
def test_resumed_it_is_the_average_of_the_uninterrupted_run(runs: Mapping[str, Run], name: str) -> None:
    assert len(runs[name].losses) == 2
    assert_same(runs[name], runs["one"])
    if not name.startswith("ddp"):
        whole = runs[whole_run(name)]
        assert all(torch.equal(value, whole.weights[key]) for key, value in runs[name].weights.items())
