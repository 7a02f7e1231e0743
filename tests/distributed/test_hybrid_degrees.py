"""`data_parallel_shard_degree` and `data_parallel_replicate_degree`: what they may be, and the mesh they make."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from composer import State
from composer.devices import DeviceCPU
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from torch.distributed import destroy_process_group, init_process_group
from torch.testing._internal.distributed.fake_pg import FakeStore

from recipe.config import ConfigError, RecipeConfig
from recipe.configure import load_config
from recipe.estimate import build_on_meta, estimate, main, table
from recipe.optim import fsdp
from recipe.optim.groups import num_copies
from recipe.rules import check_config
from recipe.upstream.trainer_section import shards_and_replicas
from tests.distributed.fsdp_shim import HYBRID
from tests.support.tiny_cases import make_model

YAML = Path(__file__).resolve().parents[2] / "yamls" / "joint_fsdp.yaml"
WHERE = "trainer.parallelism_config.fsdp"


def degrees(shards: object, replicas: object) -> dict[str, Any]:
    return {"data_parallel_shard_degree": shards, "data_parallel_replicate_degree": replicas}


@pytest.mark.parametrize(
    ("keywords", "world_size", "expected"),
    [
        (None, 4, (1, 4)),
        ({}, 64, (64, 1)),
        (degrees(-1, None), 64, (64, 1)),
        (degrees(8, -1), 64, (8, 8)),
        (degrees(8, -1), 8, (8, 1)),
        (degrees(-1, 4), 8, (2, 4)),
        (degrees(4, 6), 24, (4, 6)),
        (degrees(-1, 1), 1, (1, 1)),
        ({"data_parallel_replicate_degree": 2}, 4, (2, 2)),
    ],
)
def test_shards_and_replicas(keywords: Any, world_size: int, expected: tuple[int, int]) -> None:
    assert shards_and_replicas(keywords, world_size) == expected


@pytest.mark.parametrize(
    ("keywords", "world_size", "expected"),
    [
        (degrees(0, 2), 4, "data_parallel_shard_degree is 0: give a whole number above 0, or -1 for what is left"),
        (degrees(2, -2), 4, "data_parallel_replicate_degree is -2: give a whole number above 0, or -1"),
        (degrees(None, 2), 4, "data_parallel_shard_degree is None: give a whole number above 0"),
        (degrees(2.0, 2), 4, r"data_parallel_shard_degree is 2\.0: give a whole number above 0"),
        (degrees(True, 2), 4, "data_parallel_shard_degree is True: give a whole number above 0"),
        (degrees("all", 2), 4, "data_parallel_shard_degree is 'all': give a whole number above 0"),
        (degrees(-1, -1), 4, "both .* are -1, what is left: give one of them"),
        (
            degrees(2, 4),
            4,
            "2 times data_parallel_replicate_degree 4 is not the number of ranks, 4: set one of",
        ),
        (degrees(8, None), 64, "8 times data_parallel_replicate_degree 1 is not the number of ranks, 64"),
        (degrees(3, -1), 4, "3 times .* -1 is not the number of ranks, 4: .* the other to a divisor of 4"),
        (degrees(8, -1), 4, "8 times .* -1 is not the number of ranks, 4"),
        (degrees(1, 4), 4, f"{WHERE}: 4 replicas on 4 ranks leave nothing to shard: .*parallelism_config=null for DDP"),
        (degrees(-1, 4), 4, "4 replicas on 4 ranks leave nothing to shard"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(keywords: Any, world_size: int, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        shards_and_replicas(keywords, world_size)


def test_the_yaml_is_judged_by_the_ranks_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "64")
    keys = [f"{WHERE}.data_parallel_shard_degree=8", f"{WHERE}.data_parallel_replicate_degree="]
    check_config(load_config(str(YAML), [keys[0], f"{keys[1]}-1"]))
    with pytest.raises(ConfigError, match="8 times data_parallel_replicate_degree 4 is not the number of ranks, 64"):
        check_config(load_config(str(YAML), [keys[0], f"{keys[1]}4"]))


def test_the_estimate_judges_by_the_ranks_it_is_asked_about(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(YAML), "--world-size", "64", f"{WHERE}.data_parallel_shard_degree=8"])
    assert "8 times data_parallel_replicate_degree 1 is not the number of ranks, 64" in capsys.readouterr().err


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """This is rank 3 of four, whose messages go nowhere."""
    init_process_group("fake", rank=3, world_size=4, store=FakeStore())
    yield
    destroy_process_group()


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("keywords", "shape", "copies"), [({}, (4,), 1), (HYBRID, (2, 2), 2)])
def test_composer_makes_the_mesh_of_the_degrees(
    tiny_config: Callable[..., RecipeConfig],
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    keywords: dict[str, Any],
    shape: tuple[int, ...],
    copies: int,
) -> None:
    monkeypatch.setattr(fsdp, "check_device", lambda: None)
    monkeypatch.setattr(FSDP2Config, "settable_attrs", FSDP2Config.settable_attrs)  # put back at the end
    model = make_model(tiny_config())
    built = fsdp.build_parallelism(model.model, keywords, "fp32", version)
    assert built is not None
    sections: dict[str, Any] = {"fsdp" if version == 1 else "fsdp2": built["fsdp"]}
    config = ParallelismConfig(**sections)
    state = State(model, 1, "run", DeviceCPU(), parallelism_config=config)
    mesh = built["fsdp"].device_mesh
    assert mesh is not None and tuple(mesh.shape) == shape
    assert mesh.mesh_dim_names is not None and mesh.mesh_dim_names[-1] == "data_parallel_shard"
    assert mesh.mesh.tolist() == ([[0, 1], [2, 3]] if copies == 2 else [0, 1, 2, 3])  # a group's ranks are neighbours
    monkeypatch.setattr(type(state), "fsdp_enabled", True)  # no unit is wrapped here
    assert num_copies(state) == copies


def test_fsdp2_config_has_no_degrees_of_its_own() -> None:
    """What `recipe/upstream/hybrid_sharding.py` works around."""
    with pytest.raises(TypeError, match="data_parallel_shard_degree"):
        FSDP2Config(**degrees(2, 2))


def test_the_estimate_divides_by_the_shards(tiny_config: Callable[..., RecipeConfig]) -> None:
    def config(**keywords: Any) -> RecipeConfig:
        trainer = {"max_duration": "1ep", "precision": "amp_bf16", "parallelism_config": {"fsdp": keywords}}
        return replace(tiny_config(model={"dtype": "float32"}), trainer=trainer)

    network = build_on_meta(config())
    hybrid, plain = config(**degrees(8, -1)), config()
    assert estimate(hybrid, network, 64) == estimate(plain, network, 8) != estimate(plain, network, 64)
    assert "64 x FSDP, 8 groups of 8\n" in table(hybrid, network, 64)
    assert "64 x FSDP\n" in table(plain, network, 64)
