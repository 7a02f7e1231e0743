"""The same command again: what a run does with the folder of an earlier one."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.shapes import iter_samples
from convert.write import write_split
from recipe.checkpoints.check import newest_valid
from recipe.checkpoints.weights import read_weights
from recipe.config import NEW_RUN, EmaConfig, LoaderConfig, RecipeConfig, SaveBestConfig
from recipe.configure import load_config
from recipe.joint import JointModel
from recipe.models.network import AVERAGE
from recipe.train import main
from tests.support.tiny_cases import make_config


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("scenes"))
    write_split(iter_samples(num_samples=4, seed=11, image_size=84), folder, "train")
    return folder


@pytest.fixture
def config(tiny_checkpoint: str, scenes: str, tmp_path: Path) -> RecipeConfig:
    """Two steps, each with a checkpoint and an evaluation."""
    stream = {"shapes": {"local": scenes, "split": "train"}}
    return replace(
        make_config(tiny_checkpoint, model={"dtype": "float32"}),
        run_folder=str(tmp_path / "run"),
        train_loader=LoaderConfig(streams=stream, global_batch_size=2),
        eval_loader=LoaderConfig(streams=stream, global_batch_size=4),
        trainer={"max_duration": "2ba", "eval_interval": "1ba", "save_interval": "1ba", "progress_bar": False},
    )


def longer(config: RecipeConfig, steps: int, **changes: Any) -> RecipeConfig:
    return replace(config, trainer={**config.trainer, "max_duration": f"{steps}ba"}, **changes)


def run(config: RecipeConfig) -> int:
    """Train; return the last batch."""
    trainer = main(config)
    trainer.close()
    return int(trainer.state.timestamp.batch)


def manifest(config: RecipeConfig) -> Any:
    found = newest_valid(f"{config.run_folder}/checkpoints")
    assert found is not None
    return found.manifest


def failing_evaluation(patch: pytest.MonkeyPatch, config: RecipeConfig) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ArithmeticError("an evaluation record that cannot be used")

    with patch.context() as broken, pytest.raises(ArithmeticError):
        broken.setattr(JointModel, "eval_forward", fail)
        main(config)


def test_an_evaluation_that_fails_loses_no_step(
    config: RecipeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, save_best=SaveBestConfig(metric="eval/recall_ceiling"))
    failing_evaluation(monkeypatch, config)
    assert (manifest(config).batch, manifest(config).scores) == (1, None)
    with caplog.at_level(logging.INFO):
        assert run(config) == 2
    assert "the evaluation of batch 1 had not ended" in caplog.text
    assert manifest(config).scores["recall_ceiling"] >= 0
    assert Path(config.run_folder, "checkpoints", "best-rank0.pt").exists()
    caplog.clear()
    assert run(config) == 2
    assert "had not ended" not in caplog.text and "already ended" in caplog.text


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(
    "stopper",
    [
        {"early_stopper": {"monitor": "recall_ceiling", "dataloader_label": "eval", "patience": "1ba"}},
        {"threshold_stopper": {"monitor": "num_images", "dataloader_label": "eval", "threshold": -2, "comp": "gt"}},
    ],
)
def test_a_stopped_run_stays_stopped(
    config: RecipeConfig, stopper: Any, cut: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if its last evaluation was cut off; what is asked now counts."""
    monitor = "recall_ceiling"
    (name,) = stopper
    stopper[name]["monitor"] = monitor
    config = longer(config, 6, callbacks=stopper)
    if cut:
        failing_evaluation(monkeypatch, config)
    end = run(config)
    assert end < 6
    assert f"{name} stopped the run at batch {end}: {monitor}" in caplog.text
    caplog.clear()
    assert run(config) == end
    assert f"{name} stopped the run at batch {end}: {monitor}" in caplog.text
    assert run(replace(config, callbacks={})) == 6


def test_the_configuration_belongs_to_the_weights(config: RecipeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = Path(config.run_folder, "config.yaml")
    run(config)
    before = saved.read_text()
    other = replace(config, prompt=replace(config.prompt, detect="Find things."))
    run(other)  # has ended
    assert saved.read_text() == before
    with pytest.raises(ValueError, match="another model"):
        run(longer(other, 3, detection_head=replace(config.detection_head, num_queries=3)))
    assert saved.read_text() == before

    def fail(*args: Any) -> None:
        raise ArithmeticError

    with monkeypatch.context() as broken, pytest.raises(ArithmeticError):
        broken.setattr(JointModel, "loss", fail)  # in the first step, before it has a checkpoint
        main(longer(other, 3))
    assert saved.read_text() == before
    run(longer(other, 3))
    assert load_config(str(saved)).prompt.detect == "Find things."


def test_averages_begin_as_the_weights(config: RecipeConfig, tmp_path: Path) -> None:
    """And the remedies that a resume with averages prints work."""
    run(config)
    start = str(Path(config.run_folder, "checkpoints", "latest-rank0.pt").resolve())
    averaging = longer(config, 3, ema=EmaConfig(update_interval="9ba"))
    with pytest.raises(ValueError, match=f"set ema=null, or start a new run.*{NEW_RUN}"):
        run(averaging)
    other = replace(averaging, run_folder=str(tmp_path / "other"), load_path=start)
    other = replace(other, trainer={**other.trainer, "load_weights_only": True, "max_duration": "1ba"})
    run(other)
    weights = read_weights(start)
    averages = read_weights(tmp_path / "other" / "checkpoints" / "latest-rank0.pt")
    found = {name.replace(AVERAGE, ""): value for name, value in averages.items() if AVERAGE in name}
    assert found and all(torch.equal(value, weights[name]) for name, value in found.items())


def test_other_data_at_a_resume(config: RecipeConfig, tmp_path: Path) -> None:
    run(config)
    folder = str(tmp_path / "others")
    write_split(iter_samples(num_samples=4, seed=12, image_size=84), folder, "train")
    stream = {"shapes": {"local": folder, "split": "train"}}
    other = longer(config, 3, train_loader=replace(config.train_loader, streams=stream))
    with pytest.raises(ValueError, match=f"cannot resume: .*{NEW_RUN}"):
        run(other)
    start = f"{config.run_folder}/checkpoints/latest-rank0.pt"
    other = replace(other, run_folder=str(tmp_path / "other"), load_path=start)
    assert run(replace(other, trainer={**other.trainer, "load_weights_only": True})) == 3
