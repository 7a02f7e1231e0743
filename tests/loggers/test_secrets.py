"""Planted secrets are in nothing that a run leaves behind: its folder, byte by byte, and what it prints."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from convert.shapes import iter_samples
from convert.write import write_split
from recipe.config import LoaderConfig
from tests.launches.launch import REPOSITORY, Launch, run_composer
from tests.support.tiny_cases import make_config

MARK = "PLANTED"  # in every secret, and nowhere else
ENVIRONMENT = {
    "WANDB_API_KEY": f"{MARK}{'0' * 33}",
    "WANDB_MODE": "offline",
    "AWS_ACCESS_KEY_ID": f"{MARK}access",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}aws",
    "HF_TOKEN": f"hf_{MARK}",
}


def launch(checkpoint: str, folder: Path, *overrides: str) -> tuple[Launch, Path]:
    """The real command on a tiny run that saves a checkpoint, with every logger; its yaml holds secrets too."""
    streams = []
    for seed, name in enumerate(("train", "eval")):
        write_split(iter_samples(num_samples=4, seed=seed, image_size=84), str(folder / name), "all")
        streams.append({"main": {"local": str(folder / name), "split": "all"}})
    config = replace(
        make_config(checkpoint, model={"dtype": "float32"}),
        run_folder=str(folder / "run"),
        train_loader=LoaderConfig(streams=streams[0], global_batch_size=2),
        eval_loader=LoaderConfig(streams=streams[1], global_batch_size=4),
        loggers={
            "file": {},
            "json_lines": {},
            "tensorboard": {},
            "wandb": {"init_kwargs": {"notes": f"see https://user:{MARK}notes@host/a", "config": {"api_key": MARK}}},
        },
        trainer={"max_duration": "2ba", "eval_interval": "1ba", "save_interval": "2ba", "auto_log_hparams": True},
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(asdict(config)))
    script = REPOSITORY / "recipe" / "train.py"
    return run_composer(1, script, str(folder / "run.yaml"), *overrides, env=ENVIRONMENT, check=False), folder / "run"


def leaks(launched: Launch, run_folder: Path) -> Sequence[str]:
    found = [f"output: {line}" for line in launched.output.splitlines() if MARK in line]
    for path in run_folder.rglob("*"):
        if path.is_file() and MARK.encode() in path.read_bytes():
            found.append(str(path.relative_to(run_folder)))
    return found


@pytest.mark.slow
def test_a_run_that_succeeds(tiny_checkpoint: str, tmp_path: Path) -> None:
    # The shards are there already, so nobody asks the store.
    launched, run_folder = launch(
        tiny_checkpoint, tmp_path, f"eval_loader.streams.main.remote=s3://{MARK}key:{MARK}secret@127.0.0.1:9/data"
    )
    assert launched.returncode == 0, launched.output
    names = {path.name for path in run_folder.rglob("*")}
    assert {"config.yaml", "metrics.jsonl", "log-rank0.txt", "wandb-metadata.json", "checkpoints"} <= names
    assert list(run_folder.rglob("*.wandb"))
    assert list(run_folder.rglob("events.out.tfevents.*"))
    assert not leaks(launched, run_folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    [
        f"train_loader.streams.main={{remote: 's3://{MARK}key:{MARK}word@host/a', local: CACHE, download_retry: 0}}",
        f"load_path=https://user:{MARK}password@127.0.0.1:9/ba1.pt?token={MARK}",
        f"trainer.save_folder=s3://{MARK}key:{MARK}secret@127.0.0.1:9/checkpoints",
        f"loggers.wandb.api_key={MARK}",
        f"model.api_key={MARK}",
        f"model.dtype=s3://{MARK}:{MARK}@host",
        "run_folder=${oc.env:AWS_SECRET_ACCESS_KEY}",
        "seed=${oc.decode:${oc.env:HF_TOKEN}}",
    ],
    ids=["stream", "load_path", "save_folder", "logger", "key", "value", "variable", "nested_variable"],
)
def test_a_run_that_fails(override: str, tiny_checkpoint: str, tmp_path: Path) -> None:
    launched, run_folder = launch(tiny_checkpoint, tmp_path, override.replace("CACHE", str(tmp_path / "cache")))
    assert launched.returncode != 0, launched.output
    assert not leaks(launched, run_folder), launched.output
