"""A training that logs to W&B, for the launcher: `wandb_run.py FOLDER LAST_BATCH_OF_THE_SERVER` (0: it stays)."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import requests
import torch
import wandb
from composer import Callback, Trainer
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist, get_device
from torch.utils.data import DataLoader

from recipe.callbacks.table import build_loggers
from recipe.config import RecipeConfig
from recipe.console import setup_logging
from recipe.upstream import wandb_logger as our_wandb
from tests.callbacks.test_table import ToyModel
from tests.launches.launch import leave

PROBE_SECONDS, START_SECONDS, FINISH_SECONDS = 3.0, 8.0, 5.0
NUM_BATCHES = 60


class EndServer(Callback):
    """Ends the server after a batch, and notes when each batch began."""

    def __init__(self, last_batch: int):
        self.last_batch = last_batch
        self.times: list[float] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        """Before each batch."""
        if self.last_batch and int(state.timestamp.batch) == self.last_batch and dist.get_global_rank() == 0:
            requests.post(os.environ["WANDB_BASE_URL"] + "/die", timeout=5)
        self.times.append(time.monotonic())


def run(folder: str, last_batch: int) -> None:
    """Trains, and writes to `report.json` how long its parts took, in seconds."""
    our_wandb.PROBE_SECONDS, our_wandb.START_SECONDS, our_wandb.FINISH_SECONDS = (
        PROBE_SECONDS,
        START_SECONDS,
        FINISH_SECONDS,
    )
    dist.initialize_dist(get_device("cpu"))
    config = RecipeConfig(run_folder=folder, loggers={"wandb": {"init_kwargs": {"mode": "online"}}})
    model, times = ToyModel(), EndServer(last_batch)
    data: Any = [{"x": torch.ones(4)} for _ in range(NUM_BATCHES * dist.get_world_size())]
    started = time.monotonic()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, batch_size=1, sampler=dist.get_sampler(data)),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration="1ep",
        callbacks=[times],
        loggers=build_loggers(config.loggers, config.run_folder),
        progress_bar=False,
        device="cpu",
    )
    ready = time.monotonic()
    mode = wandb.run.settings.mode if wandb.run else None
    trainer.fit()
    fitted = time.monotonic()
    trainer.close()
    report = {"start": ready - started, "close": time.monotonic() - fitted, "mode": mode}
    report["slowest_batch"] = max(after - before for before, after in zip(times.times, times.times[1:], strict=False))
    if dist.get_global_rank() == 0:
        Path(folder, "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    setup_logging()
    run(sys.argv[1], int(sys.argv[2]))
    if dist.get_world_size() > 1:
        leave()
