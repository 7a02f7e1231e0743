"""A model small enough to train in a unit test, with the recipe's own saver."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer import Callback, ComposerModel, State, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from recipe.checkpoints.check import Origin
from recipe.checkpoints.resume import EXCLUDED_ALGORITHMS, safe_loading
from recipe.checkpoints.save import CheckpointSaver

ORIGIN = Origin(config={"seed": 1, "optimizer": {"lr": 0.1}}, tokenizer="t", model="m")


class TinyModel(ComposerModel):
    """A linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch: Tensor) -> Tensor:
        return self.layer(batch)

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return outputs.square().mean()


def make_saver(folder: Path | str, **keywords: Any) -> CheckpointSaver:
    """Of `ba{batch}.pt`, after every batch."""
    defaults: dict[str, Any] = {"filename": "ba{batch}.pt", "save_interval": "1ba", "overwrite": True}
    return CheckpointSaver(ORIGIN, folder=str(folder), **{**defaults, **keywords})


def make_trainer(
    saver: CheckpointSaver, steps: int, load_path: str | None = None, callbacks: tuple[Callback, ...] = ()
) -> Trainer:
    """Four samples, two a step, AdamW; 1 epoch is 2 steps."""
    torch.manual_seed(0)
    model = TinyModel()
    loader = DataLoader([torch.full((4,), float(i)) for i in range(4)], batch_size=2)  # pyright: ignore
    with safe_loading():
        return Trainer(
            model=model,
            train_dataloader=loader,
            optimizers=torch.optim.AdamW(model.parameters(), 0.1),
            callbacks=[*callbacks, saver],
            max_duration=f"{steps}ba",
            load_path=load_path,
            load_exclude_algorithms=list(EXCLUDED_ALGORITHMS),
            progress_bar=False,
            auto_log_hparams=False,
        )


def train(folder: Path | str, steps: int, load_path: str | None = None, **keywords: Any) -> Trainer:
    """Trains and closes; the checkpoints are in the folder."""
    trainer = make_trainer(make_saver(folder, **keywords), steps, load_path)
    trainer.fit()
    trainer.close()
    return trainer


class AtBatch(Callback):
    """Does something at the start of one batch."""

    def __init__(self, batch: int, action: Callable[[], object]):
        self.batch = batch
        self.action = action

    def batch_start(self, state: State, logger: Any) -> None:
        if state.timestamp.batch == self.batch:
            self.action()


def truncate(path: Path) -> None:
    """Loses its second half."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    """Changes one bit in its middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
