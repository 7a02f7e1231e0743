"""A run with adapters on a language model in nf4 through every entry: trained, resumed, evaluated, exported, reused."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipe.checkpoints.base import FINGERPRINT, fingerprint
from recipe.checkpoints.check import MANIFEST
from recipe.checkpoints.weights import export_model, find_config, read_weights
from recipe.config import (
    ConfigError,
    EmaConfig,
    LoaderConfig,
    LoraConfig,
    LoraPartConfig,
    OptimizerConfig,
    RecipeConfig,
    StagedFreezingConfig,
)
from recipe.configure import load_config
from recipe.eval import main as evaluate
from recipe.export import main as export
from recipe.export import parse
from recipe.load import load_network
from recipe.models.lora import adapters, merge_adapters
from recipe.models.nf4 import nf4_layers
from recipe.models.vlm import load_vlm
from recipe.train import main
from tests.support.tiny_cases import build_checkpoint, make_config
from tests.support.tiny_scenes import write_scenes

Configure = Callable[..., RecipeConfig]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base published in bfloat16."""
    folder = str(tmp_path_factory.mktemp("base") / "tiny")
    build_checkpoint(folder)
    load_vlm(folder, "sdpa", "bfloat16").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def configure(base: str, tmp_path_factory: pytest.TempPathFactory) -> Configure:
    """Makes a run's configuration: a checkpoint and an evaluation after every step; a stage begins with the second."""
    stream = {"shapes": {"local": write_scenes(tmp_path_factory.mktemp("scenes")), "split": "train"}}

    def make(folder: Path, steps: int = 2, frozen_dtype: str = "nf4", **changes: Any) -> RecipeConfig:
        config = replace(
            make_config(base, model={"dtype": "float32", "frozen_dtype": frozen_dtype}),
            run_folder=str(folder),
            lora=LoraConfig(llm=LoraPartConfig(rank=4, dropout=0.1, dora=True)),
            optimizer=OptimizerConfig(lr_vision=0, lr_merger=0, lr_llm=0, lr_lora_llm=1e-2, lr_detection=1e-3),
            staged_freezing=StagedFreezingConfig(
                {"lora_llm": [{"from": "0ba", "lr": "frozen"}, {"from": "1ba", "lr": 1.0}]}
            ),
            ema=EmaConfig(half_life="2ba"),
            train_loader=LoaderConfig(streams=stream, global_batch_size=2),
            eval_loader=LoaderConfig(streams=stream, global_batch_size=4),
            callbacks={"group_metrics": {"interval": "1ba"}},
            trainer={
                "max_duration": f"{steps}ba",
                "eval_interval": "1ba",
                "save_interval": "1ba",
                "progress_bar": False,
                "device_train_microbatch_size": 1,
            },
        )
        return replace(config, **changes)

    return make


def checkpoint(config: RecipeConfig, batch: int = 2) -> Path:
    return Path(config.run_folder, "checkpoints", f"ep0-ba{batch}-rank0.pt")


def train(config: RecipeConfig) -> tuple[Any, dict[str, Tensor]]:
    """Train; return the trainer, and all weights and moments at the end."""
    trainer = main(config)
    trainer.close()
    found = {name: weight.detach().clone() for name, weight in trainer.state.model.named_parameters()}
    saved = torch.load(checkpoint(config, int(trainer.state.timestamp.batch)), weights_only=False)["state"]
    for name, entry in next(iter(saved["optimizers"].values()))["state"].items():
        found |= {f"{name} {key}": value for key, value in entry.items()}
    return trainer, found


@pytest.fixture(scope="module")
def trained(
    configure: Configure, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RecipeConfig, Any, dict[str, Tensor]]:
    config = configure(tmp_path_factory.mktemp("trained") / "run")
    return config, *train(config)


def begun_from(config: RecipeConfig, start: object) -> RecipeConfig:
    return replace(config, load_path=str(start), trainer={**config.trainer, "load_weights_only": True})


@torch.no_grad()
def logits(vlm: Any) -> Tensor:
    return vlm.eval()(input_ids=torch.arange(20)[None]).logits


def far(first: Any, second: Any) -> float:
    return float((logits(first) - logits(second)).abs().max())


def test_a_checkpoint_holds_what_is_trained(trained: tuple[RecipeConfig, Any, dict[str, Tensor]], base: str) -> None:
    """On the base that the same run with weights in bfloat16 names."""
    config, trainer, _ = trained
    weights = read_weights(checkpoint(config))
    kept = {name for name in weights if name.startswith("model.vlm.")}
    assert len(kept) == 2 * 7 * 3 and all(".lora_" in name for name in kept)
    rounded = replace(config, model=replace(config.model, frozen_dtype="bfloat16"))
    network, _, _ = load_network(checkpoint(config), rounded)
    frozen = {f"model.vlm.{name}": value for name, value in network.vlm.state_dict().items() if ".lora_" not in name}
    assert fingerprint(frozen) == bytes(weights[FINGERPRINT].tolist()).hex()
    moved = [value for name, value in weights.items() if ".lora_B." in name]
    assert len(moved) == 14 and all(value.abs().max() > 0 for value in moved)
    assert len(nf4_layers(trainer.state.model)) == 14 and not nf4_layers(network)


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(
    trained: tuple[RecipeConfig, Any, dict[str, Tensor]], configure: Configure, tmp_path: Path
) -> None:
    """Stopped before its second stage, with dropout, averages and moments."""
    _, _, whole = trained
    train(configure(tmp_path / "run", steps=1))
    _, found = train(configure(tmp_path / "run", steps=2))
    assert found.keys() == whole.keys()
    assert [name for name in found if not torch.equal(found[name], whole[name])] == []


def test_what_predicts_and_evaluates_is_what_was_trained(
    trained: tuple[RecipeConfig, Any, dict[str, Tensor]], tmp_path: Path
) -> None:
    """To the bit, from the checkpoint and from a folder of adapters."""
    config, trainer, _ = trained
    trainer.state.model.eval()
    expected = logits(trainer.state.model.model.vlm.hf_model)
    export(parse(["--checkpoint", str(checkpoint(config)), "--out", str(tmp_path / "adapters"), "--adapters"]))
    assert load_config(str(tmp_path / "adapters/recipe.yaml")).model.frozen_dtype == "nf4"
    for source in (checkpoint(config), tmp_path / "adapters"):
        network, _, _ = load_network(source)
        assert torch.equal(logits(network.vlm.hf_model), expected) and len(nf4_layers(network)) == 14
    scores = {name: float(value) for name, value in trainer.state.eval_metric_values.items()}
    given = replace(config, run_folder=str(tmp_path / "eval"), load_path=str(checkpoint(config)))
    assert evaluate(given) == scores


def test_an_export_merges_into_the_base_in_bfloat16(
    trained: tuple[RecipeConfig, Any, dict[str, Tensor]], base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not into the values of nf4; and what is written is no longer stored in it."""
    config, trainer, _ = trained
    with caplog.at_level(logging.INFO):
        export(parse(["--checkpoint", str(checkpoint(config)), "--out", str(tmp_path / "merged")]))
    assert "the run stored its base model in nf4" in caplog.text and "in bfloat16" in caplog.text
    written = load_config(str(tmp_path / "merged/recipe.yaml"))
    assert (written.lora, written.model.frozen_dtype) == (None, "bfloat16")
    found, _, _ = load_network(tmp_path / "merged")
    expected, _, _ = load_network(
        checkpoint(config), replace(config, model=replace(config.model, frozen_dtype="bfloat16"))
    )
    merge_adapters(expected.vlm.hf_model)
    assert far(found.vlm.hf_model, expected.vlm.hf_model) == 0
    assert far(found.vlm.hf_model, trainer.state.model.model.vlm.hf_model) > 0.01
    network, processor, _ = load_network(checkpoint(config))
    with pytest.raises(ValueError, match="is stored in nf4: load it with in_nf4=False"):
        export_model(network, processor, config, tmp_path / "wrong")


@pytest.mark.parametrize("frozen_dtypes", [("bfloat16", "nf4"), ("nf4", "bfloat16")])
def test_a_run_begins_from_one_that_stored_otherwise(
    configure: Configure, tmp_path: Path, frozen_dtypes: tuple[str, str]
) -> None:
    """On the same base; its checkpoints lack it too."""
    first, second = (configure(tmp_path / name, 1, name) for name in frozen_dtypes)
    train(first)
    trainer, _ = train(begun_from(second, checkpoint(first, 1)))
    saved = read_weights(checkpoint(second, 1))
    assert FINGERPRINT in saved and not any("base_layer" in name for name in saved)
    assert len(nf4_layers(trainer.state.model)) == (14 if frozen_dtypes[1] == "nf4" else 0)


def test_a_run_begins_from_adapters(
    trained: tuple[RecipeConfig, Any, dict[str, Tensor]], configure: Configure, tmp_path: Path
) -> None:
    """Their folder holds no weight of the base, so the checkpoints of the run do not either."""
    config, _, _ = trained
    export(parse(["--checkpoint", str(checkpoint(config)), "--out", str(tmp_path / "adapters"), "--adapters"]))
    again = begun_from(configure(tmp_path / "again", 1), tmp_path / "adapters")
    trainer, _ = train(again)
    saved = read_weights(checkpoint(again, 1))
    assert FINGERPRINT in saved and not any(".nf4_" in name for name in saved)
    before = read_weights(checkpoint(config))
    own = {
        f"model.vlm.hf_model.{name}": value for name, value in adapters(trainer.state.model.model.vlm.hf_model).items()
    }
    assert all(torch.equal(value, before[name]) for name, value in own.items())  # frozen in the first stage


def test_weights_of_another_base_are_refused(
    trained: tuple[RecipeConfig, Any, dict[str, Tensor]], configure: Configure, base: str, tmp_path: Path
) -> None:
    """A whole export is a base, not a start; one frozen weight that differs in bfloat16 makes another base."""
    config, _, _ = trained
    export(parse(["--checkpoint", str(checkpoint(config)), "--out", str(tmp_path / "merged")]))
    whole = configure(tmp_path / "whole", 1, lora=None, staged_freezing=StagedFreezingConfig())
    train(replace(whole, optimizer=replace(whole.optimizer, lr_llm=1e-3)))
    for start in (tmp_path / "merged", checkpoint(whole, 1)):
        begun = replace(begun_from(whole, start), run_folder=str(tmp_path / "new"))
        with pytest.raises(ConfigError, match=r"nf4 is stored from a base .* set model\.pretrained_model_name_or_path"):
            train(begun)
    vlm: Any = load_vlm(base, "sdpa", "bfloat16")
    with torch.no_grad():
        weight = vlm.model.language_model.layers[0].mlp.up_proj.weight
        weight[0, 0] += 1 / 64
    other = tmp_path / "other"
    build_checkpoint(str(other))
    vlm.save_pretrained(other)
    changed = replace(config, model=replace(config.model, pretrained_model_name_or_path=str(other)))
    with pytest.raises(ValueError, match="on top of another base model"):
        load_network(checkpoint(config), changed)
    with pytest.raises(ValueError, match="on top of another base model"):
        train(replace(changed, trainer={**config.trainer, "max_duration": "3ba"}))


def test_a_manifest_says_how_the_base_was_stored(trained: tuple[RecipeConfig, Any, dict[str, Tensor]]) -> None:
    config, _, _ = trained
    manifest = json.loads(Path(f"{checkpoint(config)}.{MANIFEST}").read_text())
    assert manifest["origin"]["config"]["model"]["frozen_dtype"] == find_config(checkpoint(config)).model.frozen_dtype
