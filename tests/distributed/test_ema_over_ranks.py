"""The average of the head over two ranks, in DDP, FSDP1 and FSDP2, is that of one process, and so are its checkpoints.

FSDP1 on the CPU saves no whole checkpoints; see `test_fsdp_runs.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from convert.write import write_split
from tests.distributed.fsdp_run import Leg
from tests.distributed.test_fsdp_runs import SAMPLES, Run, assert_same, read_run
from tests.launches.launch import run_composer
from tests.support.tiny_cases import make_samples

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
def runs(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Run]:
    folder = tmp_path_factory.mktemp("ema_runs")
    samples = make_samples()
    numbered = [replace(samples[name], id=f"{index}-{name}") for index, name in enumerate(SAMPLES)]
    write_split(numbered, str(folder / "data"), "train")
    found: dict[str, Run] = {}
    for world_size, legs in ((2, TWO_RANKS), (1, ONE_RANK)):
        settings = []
        for name, leg in legs.items():
            begin_with = leg.begin_with and str(folder / leg.begin_with)
            places = {"checkpoint": tiny_checkpoint, "data": str(folder / "data"), "out": str(folder / name)}
            settings.append(asdict(replace(leg, **places, begin_with=begin_with, ema=True)))
        path = folder / "legs.json"
        path.write_text(json.dumps(settings))
        run_composer(world_size, Path(__file__).with_name("fsdp_run.py"), str(path), timeout=1200)
        found |= {name: read_run(folder / name, world_size) for name in legs}
    return found


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", ["ddp", "fsdp1", "fsdp2", "fsdp1_kept", "fsdp2_kept", "one_fsdp2"])
def test_weights_averages_and_evaluations_are_those_of_one_process(runs: Mapping[str, Run], name: str) -> None:
    assert_same(runs[name], runs["one"])
    averages = {key: value for key, value in runs[name].weights.items() if ".average." in key}
    assert averages
    assert any(
        not torch.equal(value, runs[name].weights[key.replace(".average.", ".")]) for key, value in averages.items()
    )


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", ["fsdp2_of_fsdp2", "fsdp2_sharded", "fsdp1_sharded", "ddp_of_fsdp2"])
def test_resumed_it_is_the_average_of_the_uninterrupted_run(runs: Mapping[str, Run], name: str) -> None:
    assert len(runs[name].losses) == 2
    assert_same(runs[name], runs["one"])
    if not name.startswith("ddp"):
        whole = runs[name.split("_")[0]]
        assert all(torch.equal(value, whole.weights[key]) for key, value in runs[name].weights.items())
