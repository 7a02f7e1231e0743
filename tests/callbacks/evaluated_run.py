"""A whole training with or without evaluations, for tests and for the launcher: `evaluated_run.py SETTINGS_JSON`."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from recipe.callbacks import table
from recipe.config import LoaderConfig, PackingConfig, RecipeConfig, TeacherConfig
from recipe.train import main
from tests.launches.launch import leave
from tests.support.tiny_cases import make_config

STEPS = 5


class Losses(Callback):
    """Keeps the loss of every batch."""

    def __init__(self) -> None:
        self.totals: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        """After each batch."""
        self.totals.append(state.total_loss_dict["loss/train/total"])


def config_of(checkpoint: str, data: str, folder: str, eval_interval: str) -> RecipeConfig:
    """Everything that draws at random: dropout, denoising, few-shot teachers, a shuffling loader with workers."""

    def stream(split: str) -> dict[str, str]:
        return {"local": data, "split": split}

    return replace(
        make_config(
            checkpoint,
            model={"dtype": "float32"},
            detection_head={"dropout": 0.2},
            caption_decoder={"dropout": 0.2},
            evaluation={"num_logged_images": 1},
        ),
        run_folder=folder,
        teachers=TeacherConfig(stream=stream("teachers"), num_teachers=1, teacher_ratio=0.5),
        train_loader=LoaderConfig(
            streams={"train": stream("train")},
            global_batch_size=2,
            collator="packed",
            packing=PackingConfig(max_tokens=600, window=16),
            dataset={"shuffle": True, "num_canonical_nodes": 1},
            dataloader={"num_workers": 1},
        ),
        eval_loader=LoaderConfig(streams={"val": stream("val")}, global_batch_size=2, dataloader={"num_workers": 1}),
        trainer={
            "max_duration": f"{STEPS}ba",
            "eval_interval": eval_interval,
            "device_train_microbatch_size": 1,
            "progress_bar": False,
        },
    )


def train(checkpoint: str, data: str, folder: str, eval_interval: str) -> dict[str, Any]:
    """Trains `STEPS` steps: the weights, the losses, and how often it was evaluated."""
    losses = Losses()
    original = table.CALLBACKS
    table.CALLBACKS = {**original, "losses": lambda: losses}  # pyright: ignore[reportAttributeAccessIssue]
    config = config_of(checkpoint, data, folder, eval_interval)
    config.callbacks = {"losses": {}}
    trainer = main(config)
    table.CALLBACKS = original
    weights = {name.replace("module.", ""): value.clone() for name, value in trainer.state.model.state_dict().items()}
    trainer.close()
    return {
        "weights": weights,
        "losses": losses.totals,
        "num_evaluations": len(list(Path(folder, "images").glob("*"))),
    }


if __name__ == "__main__":
    settings = json.loads(Path(sys.argv[1]).read_text())
    result = train(**settings)
    if dist.get_global_rank() == 0:
        torch.save(result, Path(settings["folder"], "result.pt"))
    leave()
