"""What a run never trains: stored in bfloat16, and taken from the base model instead of from checkpoints."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipe.checkpoints.base import FINGERPRINT, fingerprint
from recipe.checkpoints.weights import read_weights
from recipe.config import ConfigError, LoaderConfig, OptimizerConfig, RecipeConfig
from recipe.eval import main as evaluate
from recipe.export import main as export
from recipe.export import parse as parse_export
from recipe.load import load_network
from recipe.models.vlm import load_vlm
from recipe.train import main
from tests.support.tiny_cases import build_checkpoint, make_config
from tests.support.tiny_scenes import write_scenes

BACKBONE = "model.vlm."


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base published in bfloat16."""
    folder = str(tmp_path_factory.mktemp("base") / "tiny")
    build_checkpoint(folder)
    load_vlm(folder, "sdpa", "bfloat16").save_pretrained(folder)
    return folder


def frozen(base: str, scenes: str, folder: Path, steps: int = 2, **rates: Any) -> RecipeConfig:
    """The trunk is frozen but for `rates`; a checkpoint after every step."""
    stream = {"shapes": {"local": scenes, "split": "train"}}
    return replace(
        make_config(base, model={"dtype": "float32"}),
        run_folder=str(folder),
        optimizer=replace(OptimizerConfig(lr_vision=0, lr_merger=0, lr_llm=0, lr_detection=1e-3), **rates),
        train_loader=LoaderConfig(streams=stream, global_batch_size=2),
        eval_loader=LoaderConfig(streams=stream, global_batch_size=4),
        trainer={"max_duration": f"{steps}ba", "eval_interval": 0, "save_interval": "1ba", "progress_bar": False},
    )


def train(config: RecipeConfig) -> dict[str, Tensor]:
    """Train; return the weights at the end, all of them."""
    trainer = main(config)
    trainer.close()
    model: Any = trainer.state.model
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def checkpoint(config: RecipeConfig, batch: int) -> Path:
    return Path(config.run_folder, "checkpoints", f"ep0-ba{batch}-rank0.pt")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_fingerprint_by_hand() -> None:
    """Of the values in bfloat16: float32 copies of them give the same, any other value, shape or name does not."""
    weight = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.bfloat16)
    known = fingerprint({"model.a": weight})
    assert known == fingerprint({"a": weight.float()}) != fingerprint({"b": weight})
    assert known != fingerprint({"a": weight.view(4)})
    assert known != fingerprint({"a": weight + torch.tensor([[0.0, 0.0], [0.0, 1 / 64]], dtype=torch.bfloat16)})
    assert known != fingerprint({"a": weight, "b": torch.empty(0)})


@pytest.mark.parametrize("rates", [{}, {"lr_merger": 1e-4}, {"lr_vision": 1e-4}, {"lr_llm": 1e-4}])
def test_a_checkpoint_holds_what_is_trained(base: str, scenes: str, tmp_path: Path, rates: dict[str, float]) -> None:
    """And a run resumed from it ends with the bits of one that was not stopped."""
    config = frozen(base, scenes, tmp_path / "whole", steps=2, **rates)
    whole = train(config)
    kept = [name for name in read_weights(checkpoint(config, 1)) if name.startswith(BACKBONE)]
    trained = {"merger": ".merger.", "vision": ".visual.", "llm": "language_model"}
    marks = [trained[rate.removeprefix("lr_")] for rate in rates]
    assert bool(kept) == bool(rates)
    assert all(any(mark in name for mark in (*marks, "lm_head")) for name in kept)
    cut = frozen(base, scenes, tmp_path / "cut", steps=1, **rates)
    train(cut)
    assert_same(train(replace(cut, trainer=config.trainer)), whole)
    dtypes = {weight.dtype for name, weight in whole.items() if name.startswith(BACKBONE)}
    assert dtypes == {torch.bfloat16, *([torch.float32] if rates else [])}


def test_frozen_weights_stay_as_they_were_published(base: str, scenes: str, tmp_path: Path) -> None:
    weights = train(frozen(base, scenes, tmp_path / "run"))
    published = load_vlm(base, "sdpa", "bfloat16").state_dict()
    for name, value in published.items():
        if (found := weights.get(f"model.vlm.hf_model.{name}")) is not None:
            assert torch.equal(found, value), name


@pytest.mark.parametrize("entry", ["predict", "export"])
def test_what_reads_a_checkpoint_takes_the_rest_from_the_base(
    base: str, scenes: str, tmp_path: Path, entry: str
) -> None:
    config = frozen(base, scenes, tmp_path / "run")
    weights = train(config)
    source = checkpoint(config, 2)
    if entry == "export":
        export(parse_export(["--checkpoint", str(source), "--out", str(tmp_path / "exported")]))
        source = tmp_path / "exported"
    network, _, _ = load_network(source)
    found = {f"model.{name}": parameter.detach() for name, parameter in network.named_parameters()}
    assert_same(found, weights)


def test_evaluated_is_what_was_trained(base: str, scenes: str, tmp_path: Path) -> None:
    config = frozen(base, scenes, tmp_path / "run")
    trainer = main(replace(config, trainer={**config.trainer, "eval_interval": "2ba"}))
    scores = {name: float(value) for name, value in trainer.state.eval_metric_values.items()}
    trainer.close()
    found = evaluate(replace(config, run_folder=str(tmp_path / "eval"), load_path=str(checkpoint(config, 2))))
    assert found == scores


@pytest.mark.parametrize("entry", ["train", "load_path", "predict"])
def test_another_base_is_refused(base: str, scenes: str, tmp_path: Path, entry: str) -> None:
    """Of the same shapes; one frozen weight differs."""
    config = frozen(base, scenes, tmp_path / "run", steps=1)
    train(config)
    vlm = load_vlm(base, "sdpa", "bfloat16")
    with torch.no_grad():
        vlm.model.language_model.norm.weight[0] += 1
    other = tmp_path / "other"
    build_checkpoint(str(other))
    vlm.save_pretrained(other)
    config = replace(config, model=replace(config.model, pretrained_model_name_or_path=str(other)))
    with pytest.raises(ValueError, match="on top of another base model"):
        if entry == "predict":
            load_network(checkpoint(config, 1), config)
        elif entry == "load_path":
            start = str(checkpoint(config, 1))
            keywords = {**config.trainer, "load_weights_only": True}
            train(replace(config, run_folder=str(tmp_path / "new"), load_path=start, trainer=keywords))
        else:
            train(replace(config, trainer={**config.trainer, "max_duration": "2ba"}))


@pytest.mark.parametrize("started_from", ["weights", "export", "part"])
def test_frozen_weights_that_are_not_the_bases_stay_in_checkpoints(
    base: str, scenes: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, started_from: str
) -> None:
    """The language model was trained by an earlier run, and is frozen in the one that starts from it.

    "part": the earlier run froze the rest, so its checkpoint lacks that.
    """
    rates = {} if started_from == "part" else {"lr_vision": 1e-3, "lr_merger": 1e-3}
    first = frozen(base, scenes, tmp_path / "first", steps=1, lr_llm=1e-3, **rates)
    train(first)
    start = checkpoint(first, 1)
    if started_from == "export":
        export(parse_export(["--checkpoint", str(start), "--out", str(tmp_path / "exported")]))
        start = tmp_path / "exported"
    config = frozen(base, scenes, tmp_path / "second", steps=1)
    config = replace(config, load_path=str(start), trainer={**config.trainer, "load_weights_only": True})
    with caplog.at_level(logging.INFO):
        weights = train(config)
    assert "checkpoints hold the frozen weights too" in caplog.text
    saved = read_weights(checkpoint(config, 1))
    assert FINGERPRINT not in saved and {name for name in weights if name.startswith(BACKBONE)} <= saved.keys()
    longer = replace(config, trainer={**config.trainer, "max_duration": "2ba"})
    end = train(longer)
    whole = replace(longer, run_folder=str(tmp_path / "third"))
    assert_same(end, train(whole))


@pytest.mark.parametrize("has_manifest", [True, False])
def test_what_was_frozen_can_be_trained_by_the_next_run(
    base: str, scenes: str, tmp_path: Path, has_manifest: bool
) -> None:
    """From a checkpoint without it: it begins as the base's, and the next checkpoints hold it."""
    first = frozen(base, scenes, tmp_path / "first", steps=1)
    train(first)
    start = checkpoint(first, 1)
    if not has_manifest:
        start = start.rename(tmp_path / "alone.pt")
    config = frozen(base, scenes, tmp_path / "second", steps=1, lr_llm=1e-3)
    config = replace(config, load_path=str(start), trainer={**config.trainer, "load_weights_only": True})
    train(config)
    saved = read_weights(checkpoint(config, 1))
    assert any("language_model" in name for name in saved) and not any(".visual." in name for name in saved)


def test_resumed_with_another_rate_of_a_frozen_group_is_refused(base: str, scenes: str, tmp_path: Path) -> None:
    config = frozen(base, scenes, tmp_path / "run", steps=1)
    train(config)
    with pytest.raises(ConfigError, match="saved with the group frozen"):
        train(replace(config, optimizer=replace(config.optimizer, lr_llm=1e-4)))
