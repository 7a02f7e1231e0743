"""`recipe.checkpoints.weights`: a genuine Composer checkpoint is read, anything else is refused and never run."""

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipe.checkpoints.weights import find_base_model, find_config, read_weights
from recipe.configure import load_config, save_config
from recipe.joint import JointModel
from tests.support.s3_server import S3Server
from tests.support.tiny_cases import load_model


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def change_weights(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a checkpoint with its weights changed, its run's configuration beside it."""
    weights = read_weights(source)
    change(weights)
    torch.save({"state": {"model": weights}, "rng": None}, target)
    shutil.copy(source.parents[1] / "config.yaml", target.parent)
    return target


def test_genuine_checkpoint_is_read_whole(trained_checkpoint: Path):
    expected = torch.load(trained_checkpoint, weights_only=False)["state"]["model"]
    found = read_weights(trained_checkpoint)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_loaded_model_has_the_checkpoint_not_the_base_weights(trained_checkpoint: Path, tiny_checkpoint: str):
    model, processor, config = load_model(trained_checkpoint)
    expected = read_weights(trained_checkpoint)
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert config == load_config(str(trained_checkpoint.parents[1] / "config.yaml"))
    assert config.model.pretrained_model_name_or_path == tiny_checkpoint
    assert processor.tokenizer.eos_token == "<|im_end|>"
    generation = model.model.vlm.hf_model.generation_config
    assert generation is not None
    assert generation.pad_token_id == processor.tokenizer.pad_token_id
    assert isinstance(generation.eos_token_id, list)


def test_base_weights_are_not_needed(trained_checkpoint: Path, tiny_checkpoint: str, tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint, base, ignore=shutil.ignore_patterns("*.safetensors"))
    config = find_config(trained_checkpoint)
    config = replace(config, model=replace(config.model, pretrained_model_name_or_path=str(base)))
    model, _, _ = load_model(trained_checkpoint, config)
    assert isinstance(model, JointModel)


@pytest.mark.parametrize("variable", ["UNRELATED", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_harmful_checkpoint_is_refused_and_not_run(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, "1")
    marker = tmp_path / "ran"
    checkpoint = tmp_path / "harmful.pt"
    torch.save({"state": {"model": {"weight": torch.ones(1)}, "callbacks": [Harmful(marker)]}}, checkpoint)
    with pytest.raises(ValueError, match=r"holds \w+\.mkdir, which could run code: refused"):
        read_weights(checkpoint)
    assert not marker.exists()
    torch.load(checkpoint, weights_only=False)
    assert marker.exists(), "the file is harmful where code is run"


def test_harmful_pickle_is_refused_and_not_run(tmp_path: Path):
    marker = tmp_path / "ran"
    checkpoint = tmp_path / "harmful.pt"
    checkpoint.write_bytes(pickle.dumps(Harmful(marker)))
    with pytest.raises(ValueError, match=r"is not a readable Composer checkpoint"):
        read_weights(checkpoint)
    assert not marker.exists()


def test_truncated_checkpoint_is_told(trained_checkpoint: Path, tmp_path: Path):
    short = tmp_path / "short.pt"
    data = trained_checkpoint.read_bytes()
    short.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"short.pt is not a readable Composer checkpoint: "):
        read_weights(short)


@pytest.mark.parametrize("content", [[1, 2], {"state": {}}, {"state": {"model": {"weight": 3}}}])
def test_another_programs_file_is_told(content: Any, tmp_path: Path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"is not a Composer checkpoint: it holds no weights under state.model"):
        read_weights(tmp_path / "other.pt")


def test_wrong_paths_are_told(trained_checkpoint: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"missing.pt does not exist: give one from"):
        load_model(tmp_path / "missing.pt")
    with pytest.raises(
        ValueError, match=r"is not an exported model, it lacks recipe.yaml and detection_head.safetensors"
    ):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"give one of its checkpoints, such as .*latest-rank0.pt"):
        load_model(trained_checkpoint.parents[1])


def test_configuration_is_found_or_asked_for(trained_checkpoint: Path, tmp_path: Path):
    lonely = tmp_path / "a" / "b" / "c" / "model.pt"
    lonely.parent.mkdir(parents=True)
    shutil.copy(trained_checkpoint, lonely)
    with pytest.raises(ValueError, match=r"no config.yaml next to .*model.pt or .* --config YAML"):
        load_model(lonely)
    shutil.copy(trained_checkpoint.parents[1] / "config.yaml", tmp_path / "a")
    assert find_config(lonely) == find_config(trained_checkpoint)


def test_the_base_model_is_found_from_another_folder(
    trained_checkpoint: Path, tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run that named it relative to the folder it was started in."""
    run = tmp_path / "work" / "runs" / "a"
    run.mkdir(parents=True)
    shutil.copytree(tiny_checkpoint, tmp_path / "work" / "base")
    shutil.copy(trained_checkpoint, run / "it.pt")
    config = find_config(trained_checkpoint)
    relative = replace(config, model=replace(config.model, pretrained_model_name_or_path="base"))
    save_config(relative, run / "config.yaml")
    monkeypatch.chdir(tmp_path)
    assert find_base_model("base", run / "it.pt") == str(tmp_path / "work" / "base")
    load_model(run / "it.pt")
    shutil.rmtree(tmp_path / "work" / "base")
    assert find_base_model("base", run / "it.pt") == "base"


def test_misfitting_names_are_told(trained_checkpoint: Path, tmp_path: Path):
    def change(weights: dict[str, Any]) -> None:
        weights["extra"] = weights.pop("model.memory.vision_adapter.norm.weight")

    checkpoint = change_weights(trained_checkpoint, tmp_path / "changed.pt", change)
    message = r"it lacks model.memory.vision_adapter.norm.weight; it has beyond the model extra: give the configuration"
    with pytest.raises(ValueError, match=message):
        load_model(checkpoint)


def test_misfitting_shapes_are_told(trained_checkpoint: Path):
    config = find_config(trained_checkpoint)
    assert config.detection_head is not None
    config = replace(config, detection_head=replace(config.detection_head, num_queries=7))
    with pytest.raises(ValueError, match=r"of another shape model\.detection_head\..* \(5, 32\) instead of \(7, 32\)"):
        load_model(trained_checkpoint, config)


def test_a_checkpoint_in_a_store_is_read(
    trained_checkpoint: Path, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    shutil.copy(trained_checkpoint, tmp_path / "model.pt")
    address = f"{s3.upload(tmp_path, 'models', 'run')}/model.pt"
    config = find_config(trained_checkpoint)
    found, expected = load_model(address, config)[0], load_model(trained_checkpoint)[0]
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in found.state_dict().items())
    with pytest.raises(ValueError, match=r"s3://models/run/model.pt is in a store, .* --config YAML"):
        load_model(address)
    with pytest.raises(ValueError, match=r"cannot fetch s3://models/run/none.pt"):
        load_model("s3://models/run/none.pt", config)
