"""A run with adapters through every entry: trained, resumed, predicted, exported both ways, and begun from again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from recipe.build import build_model, take_weights
from recipe.checkpoints.base import FINGERPRINT
from recipe.checkpoints.check import Origin
from recipe.checkpoints.resume import HOLDS_BASE, WEIGHTS_FROM
from recipe.checkpoints.weights import HEAD_FILE, export_model, find_config, read_weights
from recipe.checks import check_machine
from recipe.config import ConfigError, EmaConfig, LoraConfig, LoraPartConfig, RecipeConfig, SchedulerConfig
from recipe.configure import load_config
from recipe.export import main as export
from recipe.export import parse
from recipe.load import load_network, load_processor
from recipe.predict import main as predict
from recipe.prediction.options import parse as parse_predict
from tests.support.tiny_cases import load_model, make_samples
from tests.support.tiny_run import train_tiny_run

RATES = {"lr_llm": 0.0, "lr_vision": 0.0, "lr_merger": 1e-3, "lr_lora_llm": 1e-2, "lr_lora_vision": 1e-2}
PART = LoraPartConfig(rank=4, dropout=0.1, dora=True)
CHANGES: dict[str, Any] = {
    "model": {"frozen_dtype": "same"},  # so that peft's float32 models compare
    "lora": LoraConfig(llm=PART, vision=replace(PART, rank=2)),
    "optimizer": RATES,
    "scheduler": SchedulerConfig("constant"),
    "callbacks": {"group_metrics": {"interval": "1ba"}},
    "loggers": {"json_lines": {}},
}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny_run(tiny_checkpoint, tmp_path_factory.mktemp("lora"), **CHANGES)


def exported(checkpoint: Path, out: Path, *options: str) -> Path:
    export(parse(["--checkpoint", str(checkpoint), "--out", str(out), *options]))
    return out


@pytest.fixture(scope="module")
def merged(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(checkpoint, tmp_path_factory.mktemp("merged") / "model")


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(checkpoint, tmp_path_factory.mktemp("adapters") / "model", "--adapters")


def predicted(checkpoint: Path, out: Path) -> bytes:
    image = out / "two.png"
    out.mkdir()
    image.write_bytes(make_samples()["two"].image)
    options = ["--max-new-tokens", "4", "--no-drawings", "--overwrite"]
    assert predict(parse_predict(["--checkpoint", str(checkpoint), "--out", str(out), *options, str(image)])) == 0
    return (out / "predictions.json").read_bytes().replace(str(image).encode(), b"")


@torch.no_grad()
def far(vlm: Any, other: Any) -> float:
    """The largest difference of two models' logits of a text."""
    first, second = (model.eval()(input_ids=torch.arange(20)[None]).logits for model in (vlm, other))
    return float((first - second).abs().max())


def test_training_moved_adapters_and_merger_alone(checkpoint: Path, tiny_checkpoint: str) -> None:
    weights = read_weights(checkpoint)
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint).state_dict()
    for name, value in weights.items():
        own = name.removeprefix("model.vlm.hf_model.").replace(".base_layer", "")
        if own in base:
            assert torch.equal(value, base[own]) == (".merger." not in name), name
    moved = [name for name, value in weights.items() if ".lora_B." in name and value.abs().max() > 0]
    assert len(moved) == 2 * 7 + 2 * 5


def test_norms_and_rates_are_logged_by_group(checkpoint: Path) -> None:
    """As of any group; the frozen ones below have none."""
    names: set[str] = set()
    for line in (checkpoint.parents[1] / "metrics.jsonl").read_text().splitlines():
        names |= json.loads(line)["metrics"].keys()
    groups = {"lora_vision", "lora_llm", "merger", "adapter", "detection"}
    for kind in ("lr", "weight_norm", "update_ratio", "gradient_norm"):
        found = {name.removeprefix(f"{kind}/") for name in names if name.startswith(f"{kind}/")} - {"total"}
        assert found == groups, kind


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(
    checkpoint: Path, tiny_checkpoint: str, tmp_path: Path
) -> None:
    """With dropout in the adapters, whose random states are resumed too."""
    shutil.copytree(checkpoint.parents[2], tmp_path / "resumed", symlinks=True)
    runs = {}
    for name in ("resumed", "whole"):
        path = train_tiny_run(tiny_checkpoint, tmp_path / name, steps=4, **CHANGES)
        state = torch.load(path, weights_only=False)["state"]
        optimizer = next(iter(state["optimizers"].values()))["state"]
        moments = {f"{name} {key}": value for name, entry in optimizer.items() for key, value in entry.items()}
        runs[name] = {**state["model"], **moments}
    assert runs["resumed"].keys() == runs["whole"].keys()
    assert all(torch.equal(value, runs["whole"][key]) for key, value in runs["resumed"].items())


def test_a_merged_export_is_a_plain_base(checkpoint: Path, merged: Path, tiny_checkpoint: str, tmp_path: Path) -> None:
    """It predicts the same, transformers loads it, and training begins from it with or without new adapters."""
    config = load_config(str(merged / "recipe.yaml"))
    assert config == replace(find_config(checkpoint), lora=None)
    network, _, _ = load_network(checkpoint)
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(merged)
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert far(plain, network.vlm.hf_model) <= 1e-5  # measured: 2.1e-6, of logits up to 2.5
    found, expected = (json.loads(predicted(path, tmp_path / path.name)) for path in (merged, checkpoint))
    for one, other in zip(found[0]["objects"], expected[0]["objects"], strict=True):
        assert one["box"] == pytest.approx(other["box"], abs=0.02) and one["caption"] == other["caption"]
    model = replace(config.model, pretrained_model_name_or_path=str(merged))
    for lora in (None, CHANGES["lora"]):
        again = build_model(replace(config, model=model, lora=lora), load_processor(str(merged)))
        assert far(again.model.vlm.hf_model, plain) <= 1e-5  # measured: 1.4e-6
    # The run's own yaml describes adapters that are merged here.
    found, expected = (
        load_network(merged, find_config(checkpoint))[0].state_dict(),
        load_network(merged)[0].state_dict(),
    )
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_adapters_are_peft_s_own_folder(checkpoint: Path, folder: Path, tiny_checkpoint: str, tmp_path: Path) -> None:
    """Peft puts them on the base, the trained merger too; the recipe predicts from them to the bit."""
    assert load_config(str(folder / "recipe.yaml")) == find_config(checkpoint)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny_checkpoint
    assert not (folder / "config.json").exists() and not (folder / "model.safetensors").exists()
    plain = PeftModel.from_pretrained(Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint), str(folder))
    network, _, _ = load_network(checkpoint)
    vlm = network.vlm.hf_model
    assert far(plain, vlm) <= 1e-5  # measured: 1.4e-6
    merger = plain.get_submodule("base_model.model.model.visual.merger.modules_to_save.default").state_dict()
    trained = vlm.get_submodule("model.visual.merger").state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in merger.items())
    expected, found = read_weights(checkpoint), load_model(folder)[0].state_dict()
    del expected[FINGERPRINT]
    assert expected and all(torch.equal(found[name], expected[name]) for name in expected)
    assert predicted(folder, tmp_path / "a") == predicted(checkpoint, tmp_path / "b")


def begin(config: RecipeConfig, start: Path) -> Any:
    model = build_model(config, load_processor(config.model.pretrained_model_name_or_path))
    origin = Origin({}, "tokenizer", "model")
    take_weights(model, {WEIGHTS_FROM: str(start), HOLDS_BASE: True}, config, origin)
    return model


def test_training_begins_from_adapters(
    checkpoint: Path, folder: Path, merged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, expected = find_config(checkpoint), read_weights(checkpoint)
    found = begin(config, folder).state_dict()
    del expected[FINGERPRINT]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "holds adapters of" not in caplog.text
    other = replace(config, model=replace(config.model, pretrained_model_name_or_path=str(merged)))
    begin(other, folder)
    assert f"load_path={folder} holds adapters of" in caplog.text
    with pytest.raises(ValueError, match=r"does not fit the adapters that `lora` describes: it has beyond the model"):
        begin(replace(config, lora=None), folder)
    with pytest.raises(
        ConfigError, match=rf"load_path={merged} is a whole model, .*model.pretrained_model_name_or_path="
    ):
        begin(config, merged)
    with pytest.raises(ValueError, match=r"does not fit the model: it lacks .*lora_A"):
        begin(config, make_bare(checkpoint))


def test_averages_begin_as_what_an_export_holds(checkpoint: Path, folder: Path, merged: Path) -> None:
    config = replace(find_config(checkpoint), ema=EmaConfig())
    saved = load_file(folder / HEAD_FILE)
    for asked, start in ((config, folder), (replace(config, lora=None), merged)):
        network = begin(asked, start).model
        assert len(network.averaged_parameters()) > 50
        assert all(torch.equal(parameter, average) for parameter, average in network.averaged_parameters())
        own = network.state_dict()
        assert all(torch.equal(own[name], value) for name, value in saved.items())


def make_bare(checkpoint: Path) -> Path:
    """A checkpoint that lost an adapter."""
    weights = read_weights(checkpoint)
    weights.pop(next(name for name in weights if ".lora_A." in name))
    path = checkpoint.parent / "bare.pt"
    torch.save({"state": {"model": weights}}, path)
    return path


def test_folders_that_do_not_fit_are_refused(
    checkpoint: Path, folder: Path, trained_checkpoint: Path, tmp_path: Path
) -> None:
    config = find_config(checkpoint)
    config = replace(config, model=replace(config.model, pretrained_model_name_or_path=str(folder)))
    with pytest.raises(ConfigError, match=rf"{folder} holds adapters only: give .*load_path={folder}"):
        check_machine(config)
    with pytest.raises(ValueError, match=r"the run has no adapters, as lora is null: export without --adapters"):
        exported(trained_checkpoint, tmp_path / "none", "--adapters")
    assert not list(tmp_path.iterdir())


def test_a_trained_trunk_is_not_left_out(checkpoint: Path, tmp_path: Path) -> None:
    """Only adapters of the language model, and a vision tower that was trained whole: peft's folder would lose it."""
    config = find_config(checkpoint)
    assert config.lora is not None
    alone = replace(config, lora=replace(config.lora, vision=None), optimizer=replace(config.optimizer, lr_vision=1e-3))
    network, processor, _ = load_network(checkpoint)
    with pytest.raises(ValueError, match=r"optimizer\.lr_vision is not 0, so more than adapters was trained: export w"):
        export_model(network, processor, alone, tmp_path / "out", only_adapters=True)
