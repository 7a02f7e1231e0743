"""Runs with AdamW's moments in 8 bits: resumed, in stages, next to the same run with full ones."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipe.config import (
    ConfigError,
    EmaConfig,
    LoaderConfig,
    OptimizerConfig,
    RecipeConfig,
    SchedulerConfig,
    StagedFreezingConfig,
)
from recipe.train import main
from tests.support.tiny_cases import make_config
from tests.support.tiny_scenes import write_scenes

Configure = Callable[..., RecipeConfig]


@pytest.fixture(scope="module")
def configure(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Configure:
    """Makes a run's configuration; the language model thaws with the second step."""
    stream = {"shapes": {"local": write_scenes(tmp_path_factory.mktemp("scenes")), "split": "train"}}

    def make(folder: Path, steps: int, moments: str = "8bit", **changes: Any) -> RecipeConfig:
        config = replace(
            make_config(tiny_checkpoint, model={"dtype": "float32"}),
            run_folder=str(folder),
            optimizer=OptimizerConfig(lr_llm=1e-3, lr_vision=1e-3, lr_detection=1e-3, moments=moments),
            staged_freezing=StagedFreezingConfig(
                {"llm": [{"from": "0ba", "lr": "frozen"}, {"from": "1ba", "lr": 1.0}]}
            ),
            scheduler=SchedulerConfig("constant"),
            ema=EmaConfig(half_life="2ba"),
            train_loader=LoaderConfig(streams=stream, global_batch_size=2),
            eval_loader=LoaderConfig(streams=stream, global_batch_size=4),
            callbacks={"group_metrics": {"interval": "1ba"}},
            loggers={"json_lines": {}},
            trainer={"max_duration": f"{steps}ba", "eval_interval": 0, "save_interval": "1ba", "progress_bar": False},
        )
        return replace(config, **changes)

    return make


def train(config: RecipeConfig) -> dict[str, Any]:
    """Train; return all weights, averages and moments at the end, by name."""
    trainer = main(config)
    trainer.close()
    path = Path(config.run_folder, "checkpoints", "latest-rank0.pt")
    saved = torch.load(path, weights_only=False)["state"]
    found: dict[str, Any] = dict(saved["model"])
    for name, entry in next(iter(saved["optimizers"].values()))["state"].items():
        stored = entry.pop("__bnb_optimizer_quant_state__", {})
        found |= {f"{name} {key}": value for key, value in {**entry, **stored}.items()}
    return found


def logged(config: RecipeConfig, name: str) -> list[float]:
    lines = [json.loads(line) for line in Path(config.run_folder, "metrics.jsonl").read_text().splitlines()]
    return [line["metrics"][name] for line in lines if name in line["metrics"]]


@pytest.mark.parametrize("stopped_at", [1, 2])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(
    configure: Configure, tmp_path: Path, stopped_at: int
) -> None:
    """Before and after the language model thaws, whose moments then begin; with averages."""
    whole = train(configure(tmp_path / "whole", 3))
    train(configure(tmp_path / "cut", stopped_at))
    found = train(configure(tmp_path / "cut", 3))
    assert found.keys() == whole.keys()

    def same(one: Any, other: Any) -> bool:
        return torch.equal(one, other) if isinstance(one, Tensor) else one == other

    assert [name for name in found if not same(found[name], whole[name])] == []
    kinds = [value.dtype for name, value in whole.items() if name.endswith(" state1")]
    assert {torch.uint8, torch.float32} == set(kinds)
    steps = {name: value for name, value in whole.items() if name.endswith(" step")}
    assert {value for name, value in steps.items() if "language_model" in name} == {2}
    assert {value for name, value in steps.items() if "detection_head" in name} == {3}


def test_it_learns_as_with_full_moments(configure: Configure, tmp_path: Path) -> None:
    """The losses of 12 steps, and the norms of weights and updates of every group."""
    configs = {kind: configure(tmp_path / kind, 12, kind) for kind in ("8bit", "full")}
    for config in configs.values():
        train(config)
    losses = {kind: logged(config, "loss/train/total") for kind, config in configs.items()}
    assert losses["full"][-1] < 0.8 * losses["full"][0]
    assert losses["8bit"] == pytest.approx(losses["full"], rel=0.05)
    for group in ("vision", "merger", "llm", "adapter", "detection"):
        for name, tolerance in ((f"weight_norm/{group}", 1e-3), (f"update_ratio/{group}", 0.1)):
            found, expected = (logged(configs[kind], name) for kind in ("8bit", "full"))
            assert len(found) == 12 and found == pytest.approx(expected, rel=tolerance), name


@pytest.mark.parametrize("kinds", [("full", "8bit"), ("8bit", "full")])
def test_moments_of_another_kind_are_refused(configure: Configure, tmp_path: Path, kinds: tuple[str, str]) -> None:
    train(configure(tmp_path / "run", 1, kinds[0]))
    with pytest.raises(ConfigError, match=rf"optimizer\.moments is {kinds[1]}, but .* saved with {kinds[0]}: set"):
        train(configure(tmp_path / "run", 2, kinds[1]))
