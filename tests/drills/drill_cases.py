"""Write a small training with all that a resume can get wrong, as the yaml of a real command."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.shapes import iter_samples
from convert.write import write_split
from recipe.config import (
    LoaderConfig,
    PackingConfig,
    RecipeConfig,
    SaveBestConfig,
    SchedulerConfig,
    StagedFreezingConfig,
    TeacherConfig,
)
from recipe.configure import save_config
from tests.support.tiny_cases import make_config

STEPS, SAVE_EVERY, EVALUATE_EVERY = 24, 2, 3  # batches


def write_data(folder: Path, num_train: int = 45, **options: Any) -> None:
    """Write the splits `train`, of nine samples per batch, and `val`, and the pool `teachers`.

    `options` are those of `write_split`.
    """
    for split, num_samples, seed in (("train", num_train, 1), ("val", 4, 2), ("teachers", 3, 3)):
        write_split(iter_samples(num_samples, seed, image_size=84, max_objects=5), str(folder), split, **options)


def write_yaml(path: Path, checkpoint: str, data: Path, steps: int, **changes: Any) -> Path:
    """Write a run: few-shot packs from two workers; stages, schedule, dropout, denoising; evaluated, saved, rotated.

    The best checkpoint is kept.

    Args:
        path: Of the yaml; the run's folder is named like it, next to it.
        checkpoint: Folder of the tiny language model.
        data: Of `write_data`.
        steps: Batches to train.
        changes: Keywords of the Trainer.
    """
    streams = {split: {split: {"local": str(data), "split": split}} for split in ("train", "val")}
    workers = {"num_workers": 2, "persistent_workers": True}
    config: RecipeConfig = replace(
        make_config(checkpoint, model={"dtype": "float32"}, detection_head={"dropout": 0.1}),
        run_folder=str(path.with_suffix("")),
        teachers=TeacherConfig({"local": str(data), "split": "teachers"}, num_teachers=1, teacher_ratio=0.5),
        train_loader=LoaderConfig(
            streams=streams["train"],
            global_batch_size=4,
            collator="packed",
            packing=PackingConfig(max_tokens=600, window=16),
            dataset={"shuffle": True, "num_canonical_nodes": 1},
            dataloader=workers,
        ),
        eval_loader=LoaderConfig(streams=streams["val"], global_batch_size=2, dataloader=workers),
        scheduler=SchedulerConfig(name="cosine", t_warmup="4ba", alpha_f=0.1),
        staged_freezing=StagedFreezingConfig(
            groups={
                "llm": [{"from": "0ba", "lr": "frozen"}, {"from": "5ba", "lr": 1.0}, {"from": "0.75dur", "lr": 0.1}],
                "detection": [{"from": "0ba", "lr": "frozen"}, {"from": "1ep", "lr": 1.0}],
                "vision": [{"from": "0.5dur", "lr": "frozen"}],
            }
        ),
        save_best=SaveBestConfig("eval/loss_caption", "min"),
        loggers={"json_lines": {}},
        trainer={
            "max_duration": f"{steps}ba",
            "eval_interval": f"{EVALUATE_EVERY}ba",
            "save_interval": f"{SAVE_EVERY}ba",
            "save_filename": "ba{batch}.pt",
            "save_num_checkpoints_to_keep": 2,
            "device_train_microbatch_size": 1,
            "progress_bar": False,
            **changes,
        },
    )
    save_config(config, path)
    return path


def assert_same_training(found: Path, whole: Path) -> None:
    """Assert that two checkpoints hold the same weights, optimizer and clock, to the last bit."""
    states = [torch.load(path, weights_only=False)["state"] for path in (found, whole)]
    for part in ("model", "optimizers"):
        tensors = [dict(flatten(state[part])) for state in states]
        assert tensors[0].keys() == tensors[1].keys()
        different = [name for name, value in tensors[1].items() if not equal(tensors[0][name], value)]
        assert not different, f"{len(different)} of {len(tensors[1])} values of {part} differ: {different[:5]}"
    clocks = [state["timestamp"]["Timestamp"] for state in states]
    for unit in ("epoch", "batch", "sample", "token"):
        assert clocks[0][unit] == clocks[1][unit]


def flatten(value: Any, above: str = "") -> list[tuple[str, Any]]:
    """Return all that is not a mapping or list, by its path."""
    if isinstance(value, Mapping):
        return [pair for name, item in value.items() for pair in flatten(item, f"{above}/{name}")]
    if isinstance(value, list | tuple):
        return [pair for number, item in enumerate(value) for pair in flatten(item, f"{above}/{number}")]
    return [(above, value)]


def equal(found: Any, expected: Any) -> bool:
    """Return whether both are equal, to the last bit."""
    return torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected
