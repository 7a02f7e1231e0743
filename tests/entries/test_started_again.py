"""The same command again: what a run does with the folder of an earlier one."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from convert.shapes import iter_samples
from convert.write import write_split
from recipe.checkpoints.check import MANIFEST, describe_file, newest_valid, parse_manifest, write_manifest
from recipe.checkpoints.save import CheckpointSaver
from recipe.checkpoints.weights import read_weights
from recipe.config import (
    NEW_RUN,
    ConfigError,
    DetectionHeadConfig,
    EmaConfig,
    LoaderConfig,
    RecipeConfig,
    SaveBestConfig,
)
from recipe.configure import load_config
from recipe.eval import main as evaluate
from recipe.export import main as export
from recipe.export import parse as parse_export
from recipe.joint import JointModel
from recipe.models.network import AVERAGE
from recipe.train import main
from tests.support.tiny_cases import make_config
from tests.support.tiny_run import train_tiny_run


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
    assert caplog.text.count(f"{name} stopped the run at batch {end}: {monitor}") == 1
    assert run(replace(config, callbacks={})) == 6


def test_the_configuration_belongs_to_the_weights(config: RecipeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = Path(config.run_folder, "config.yaml")
    run(config)
    before = saved.read_text()
    other = replace(config, prompt=replace(config.prompt, detect="Find things."))
    run(other)  # has ended
    assert saved.read_text() == before
    with pytest.raises(ValueError, match="another model"):
        run(longer(other, 3, detection_head=replace(config.detection_head or DetectionHeadConfig(), num_queries=3)))
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
    other = longer(config, 3, train_loader=replace(config.train_loader, streams=stream), loggers={"tensorboard": {}})
    with pytest.raises(
        ConfigError, match=rf"cannot resume: .*streams\.shapes had other samples \(4, now 4\).*{NEW_RUN}"
    ):
        run(other)
    assert not list(Path(config.run_folder).rglob("*tfevents*")), "no logger has started"
    start = f"{config.run_folder}/checkpoints/latest-rank0.pt"
    other = replace(other, run_folder=str(tmp_path / "other"), load_path=start)
    assert run(replace(other, trainer={**other.trainer, "load_weights_only": True})) == 3


def test_training_on_from_an_export_is_training_on_from_its_checkpoint(
    config: RecipeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a base or as `load_path`; a null caption length is the head's, not the new data's."""
    run(config)
    start = f"{config.run_folder}/checkpoints/latest-rank0.pt"
    exported = str(tmp_path / "exported")
    export(parse_export(["--checkpoint", start, "--out", exported]))
    any_length = replace(config.caption_decoder, max_caption_tokens=None)
    weights_only = {**config.trainer, "load_weights_only": True}
    begun = {
        "checkpoint": replace(config, load_path=start, trainer=weights_only),
        "load_path": replace(config, load_path=exported, caption_decoder=any_length),
        "base": replace(
            config,
            model=replace(config.model, pretrained_model_name_or_path=exported),
            caption_decoder=any_length,
        ),
        "new head": replace(
            config,
            model=replace(config.model, pretrained_model_name_or_path=exported),
            detection_head=replace(config.detection_head or DetectionHeadConfig(), pretrained=False, num_queries=3),
        ),
    }
    weights = {}
    for name, asked in begun.items():
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert run(replace(asked, run_folder=str(tmp_path / name))) == 2
        assert ("the head starts from" in caplog.text) == (name == "base")
        weights[name] = read_weights(tmp_path / name / "checkpoints" / "latest-rank0.pt")
    expected = weights["checkpoint"]
    for name in ("load_path", "base"):
        assert weights[name].keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in weights[name].items())
    query = "model.detection_head.query_content.weight"
    assert weights["new head"].keys() == expected.keys() and len(weights["new head"][query]) == 3

    base = begun["base"]
    with pytest.raises(
        ConfigError, match=r"detection_head.safetensors does not fit .* detection_head.pretrained=false"
    ):
        main(replace(base, detection_head=replace(config.detection_head or DetectionHeadConfig(), num_queries=3)))
    folder = str(tmp_path / "wordy")
    wordy = [
        replace(sample, objects=tuple(replace(item, caption=10 * "so red a thing ") for item in sample.objects or ()))
        for sample in iter_samples(num_samples=4, seed=13, image_size=84)
    ]
    write_split(wordy, folder, "train")
    longer_captions = replace(base.train_loader, streams={"shapes": {"local": folder, "split": "train"}})
    with pytest.raises(ConfigError, match=r"captions of up to \d+ tokens, but .*exported writes at most \d+"):
        main(replace(base, train_loader=longer_captions))


def test_an_export_is_evaluated_as_its_checkpoint(config: RecipeConfig, tmp_path: Path) -> None:
    run(config)
    start = f"{config.run_folder}/checkpoints/latest-rank0.pt"
    exported = str(tmp_path / "exported")
    export(parse_export(["--checkpoint", start, "--out", exported]))
    scores = [
        evaluate(replace(config, load_path=path, run_folder=str(tmp_path / "eval"))) for path in (start, exported)
    ]
    assert scores[0] == scores[1]


def test_a_sharded_checkpoint_is_exported_evaluated_and_trained_on(config: RecipeConfig, tmp_path: Path) -> None:
    """By one process without FSDP; `tests/distributed/test_fsdp_runs.py` reads one that FSDP wrote."""
    run(config)
    whole = Path(config.run_folder, "checkpoints", "latest-rank0.pt").resolve()
    shards = whole.with_name("ep1-ba2")
    save({"state": {"model": read_weights(whole)}}, checkpoint_id=shards, no_dist=True)
    files = {path.name: describe_file(path) for path in shards.iterdir()}
    manifest_of_whole = parse_manifest(Path(f"{whole}.{MANIFEST}").read_bytes())
    write_manifest(replace(manifest_of_whole, files=files, sharded=True), shards / MANIFEST)

    for name, path in (("whole", whole), ("gathered", shards)):
        (tmp_path / name).mkdir()
        export(parse_export(["--checkpoint", str(path), "--out", str(tmp_path / name / "exported")]))
    for path in (tmp_path / "whole" / "exported").iterdir():
        assert path.read_bytes() == (tmp_path / "gathered" / "exported" / path.name).read_bytes()
    asked = [replace(config, load_path=str(path), run_folder=str(tmp_path / "eval")) for path in (whole, shards)]
    assert evaluate(asked[0]) == evaluate(asked[1])

    new = replace(asked[1], run_folder=str(tmp_path / "new"))
    with pytest.raises(
        ValueError, match=f"is a sharded checkpoint and .*or start a new run from the weights: {NEW_RUN}"
    ):
        run(new)
    for path in (whole, shards):
        asked_again = replace(new, run_folder=str(tmp_path / path.name), load_path=str(path))
        assert run(replace(asked_again, trainer={**config.trainer, "load_weights_only": True})) == 2
    found, expected = (
        read_weights(tmp_path / path.name / "checkpoints" / "latest-rank0.pt") for path in (shards, whole)
    )
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.slow
def test_a_checkpoint_that_is_saved_again_has_the_same_random_states(
    tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a store, whose checkpoints a saver does not know: it writes one again after a repeated evaluation."""
    best = {"save_best": SaveBestConfig("eval/loss_caption", "min"), "detection_head": {"dropout": 0.1}}
    monkeypatch.setattr(CheckpointSaver, "_improves", lambda *_: True)
    train_tiny_run(tiny_checkpoint, tmp_path, steps=2, **best)
    (path,) = (tmp_path / "run" / "checkpoints").glob("*ba2-rank0.pt")
    manifest = Path(f"{path}.manifest.json")
    write_manifest(replace(parse_manifest(manifest.read_bytes()), scores=None), manifest)
    before = torch.load(path, weights_only=False)
    path.with_name("kept").hardlink_to(path)
    monkeypatch.setattr(CheckpointSaver, "resumed_from", lambda *_: None)
    train_tiny_run(tiny_checkpoint, tmp_path, steps=3, **best)
    assert not path.samefile(path.with_name("kept")), "it was written again"
    after = torch.load(path, weights_only=False)
    assert torch.equal(after["rng"][0]["torch"], before["rng"][0]["torch"])
