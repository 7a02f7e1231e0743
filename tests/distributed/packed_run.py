"""A packed training run that may kill itself: `composer -n N tests/distributed/packed_run.py SETTINGS.json`.

Launched again with the same folder for checkpoints, it goes on from the newest valid one.

Every rank appends the ids of each of its steps to OUT/ids-RANK.jsonl; the weights at the end go to OUT/weights.pt.
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlparse

import torch
from composer import Callback, Logger, State
from composer.utils import dist, maybe_create_object_store_from_uri

from recipe.callbacks import table
from recipe.config import (
    AugmentConfig,
    CacheFrozenConfig,
    ColourConfig,
    CropConfig,
    LoaderConfig,
    PackingConfig,
    RecipeConfig,
    StagedFreezingConfig,
    TeacherConfig,
)
from recipe.console import setup_logging
from recipe.train import main
from tests.launches.launch import leave
from tests.support.tiny_cases import make_config

EVERYTHING = AugmentConfig(
    horizontal_flip=0.5, crop=CropConfig(), scale_jitter=[0.6, 1.4], colour=ColourConfig(), teachers=True
)


@dataclass(frozen=True)
class Settings:
    """Of one launch.

    Attributes:
        checkpoint: Folder of the tiny language model.
        data: Folder of the splits `train` and `val` and of the pool `teachers`; or the address of its store.
        cache: Where the shards of a store are kept; empty: `data` is local.
        out: Gets ids, weights and checkpoints.
        save_folder: Of the checkpoints.
        num_workers: Of the loader.
        steps: To train in all.
        kill_at: Steps after which the last rank is killed with SIGKILL; 0: never.
        terminate_at: Steps after which SIGTERM is sent; 0: never.
        terminate: Whom: `launcher`, which hands it on to all ranks; or `rank`: the last one alone.
        frozen_cache: Folder of `cache_frozen` in a run of the head alone, without teachers; empty: a joint run.
        augment: Whether students and teachers are shown flipped, in part, in other sizes and colours.
        thaw: When vision tower, merger and language model begin to learn, such as `9ba`; empty: at the start.
    """

    checkpoint: str
    data: str
    out: str
    save_folder: str
    cache: str = ""
    num_workers: int = 0
    steps: int = 10
    kill_at: int = 0
    terminate_at: int = 0
    terminate: str = "launcher"
    thaw: str = ""
    frozen_cache: str = ""
    augment: bool = False


class Recorder(Callback):
    """Notes what each step trains on; sends signals."""

    def __init__(self, out: str, kill_at: int, terminate_at: int, terminate: str, save_folder: str):
        self.out = Path(out)
        self.kill_at = kill_at
        self.terminate_at = terminate_at
        self.terminate = terminate
        self.save_folder = save_folder

    def batch_start(self, state: State, logger: Logger) -> None:
        """Before step `kill_at + 1`, so after the checkpoint of the step before."""
        if self.terminate_at and int(state.timestamp.batch) == self.terminate_at and is_last_rank():
            os.kill(os.getppid() if self.terminate == "launcher" else os.getpid(), signal.SIGTERM)
        if self.kill_at and int(state.timestamp.batch) == self.kill_at and is_last_rank():
            wait_for_upload(self.save_folder)
            os.kill(os.getpid(), signal.SIGKILL)
        ids = [sample.id for batch in state.batch if batch["num_packs"] for sample in batch["samples"]]
        answers = any(len(batch["labels"]) for batch in state.batch)
        with (self.out / f"ids-{dist.get_global_rank()}.jsonl").open("a") as file:
            file.write(json.dumps({"step": int(state.timestamp.batch), "ids": ids, "answers": answers}) + "\n")

    def fit_end(self, state: State, logger: Logger) -> None:
        """The weights, of rank 0."""
        if dist.get_global_rank() == 0:
            weights = {name.replace("module.", ""): value for name, value in state.model.state_dict().items()}
            torch.save(weights, self.out / "weights.pt")


def wait_for_upload(save_folder: str) -> None:
    """Until a store holds a checkpoint: they are sent in the background, by the first rank."""
    store = maybe_create_object_store_from_uri(save_folder)
    until = time.monotonic() + 60
    while store is not None and time.monotonic() < until:
        if any(name.endswith(".manifest.json") for name in store.list_objects(urlparse(save_folder).path.lstrip("/"))):
            return
        time.sleep(0.5)


def is_last_rank() -> bool:
    return dist.get_global_rank() == dist.get_world_size() - 1


def config_of(settings: Settings) -> RecipeConfig:
    """Packs of 600 tokens, four a step, few-shot; evaluated and saved after every step."""

    def stream(split: str) -> dict[str, str]:
        if not settings.cache:
            return {"local": settings.data, "split": split}
        return {"remote": settings.data, "local": settings.cache, "split": split}

    stages = [{"from": "0ba", "lr": "frozen"}, {"from": settings.thaw, "lr": 1.0}]
    groups = {group: stages for group in ("vision", "merger", "llm") if settings.thaw}
    is_cached = bool(settings.frozen_cache)
    rates = {f"lr_{group}": 0.0 for group in ("vision", "merger", "llm") if is_cached}
    return replace(
        make_config(
            settings.checkpoint,
            model={"dtype": "float32"},
            evaluation={"answers": None},
            optimizer=rates,
            cache_frozen=CacheFrozenConfig(settings.frozen_cache) if is_cached else None,
        ),
        run_folder=settings.out,
        staged_freezing=StagedFreezingConfig(groups),
        teachers=TeacherConfig(stream=stream("teachers"), num_teachers=int(not is_cached), teacher_ratio=0.5),
        train_loader=LoaderConfig(
            streams={"train": stream("train")},
            global_batch_size=4,
            collator="packed",
            packing=PackingConfig(max_tokens=600, window=16),
            augment=EVERYTHING if settings.augment else None,
            # Of a file from a store: at most 2 attempts of 5 s, and 1 s between.
            dataset={"shuffle": True, "num_canonical_nodes": 1, "download_retry": 2, "download_timeout": 5},
            dataloader={"num_workers": settings.num_workers},
        ),
        eval_loader=LoaderConfig(streams={"val": stream("val")}, global_batch_size=2),
        callbacks={
            "recorder": {
                name: getattr(settings, name) for name in ("out", "kill_at", "terminate_at", "terminate", "save_folder")
            }
        },
        trainer={
            "max_duration": f"{settings.steps}ba",
            "eval_interval": "4ba",
            "save_interval": "1ba",
            "save_folder": settings.save_folder,
            "save_filename": "ba{batch}.pt",
            "device_train_microbatch_size": 1,
            "progress_bar": False,
        },
    )


if __name__ == "__main__":
    setup_logging()
    table.CALLBACKS = {**table.CALLBACKS, "recorder": Recorder}
    trainer = main(config_of(Settings(**json.loads(Path(sys.argv[1]).read_text()))))
    trainer.close()
    if dist.get_world_size() > 1:
        leave()
