"""A rollback to before the stage that it happens in; and resumed anywhere around it, bit for bit."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer import Algorithm, Event, Logger, State, Trainer
from composer.core import DataSpec
from torch import Tensor

from recipe.algorithms.nan_rollback import NaNRollback
from recipe.algorithms.staged_freezing import StagedFreezing
from recipe.config import NaNRollbackConfig, SchedulerConfig
from recipe.optim.schedule import build_curve, build_schedule
from tests.algorithms.test_staged_freezing import Recorder, Toy, toy_optimizer
from tests.support.staged_cases import MANY_STAGES, config_with, differing

CONFIG = config_with(MANY_STAGES, SchedulerConfig("cosine", "2ba", 0.1))


class SpoilWeight(Algorithm):
    """After the guard has taken its snapshot."""

    def __init__(self, batch: int):
        self.batch = batch

    def match(self, event: Event, state: State) -> bool:
        return event is Event.BATCH_START and int(state.timestamp.batch) == self.batch

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        torch.nn.init.constant_(next(state.model.parameters()), float("nan"))


class ToyOnDicts(Toy):
    """The guard wants the samples' names."""

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(batch["x"])

    def loss(self, outputs: tuple[Tensor, Tensor], batch: dict[str, Any]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().loss(outputs, batch["x"])


def train(folder: Path, spoiled: int, load_path: str | None = None) -> tuple[Recorder, NaNRollback, list[float]]:
    """Eight batches in four stages, saved every second; the snapshot is of then, or the first."""
    generator = torch.Generator().manual_seed(5)
    names = [SimpleNamespace(id="a")]
    batches = [{"x": torch.randn(2, 3, generator=generator), "samples": names} for _ in range(4)]
    model, recorder = ToyOnDicts(), Recorder()
    guard = NaNRollback(NaNRollbackConfig(snapshot_interval="50ba", lr_factor=0.3), 1.0, folder)
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(batches, split_batch=lambda batch, _: [batch], get_num_samples_in_batch=lambda _: 2),
        optimizers=toy_optimizer(model, CONFIG.optimizer),
        schedulers=build_curve(CONFIG.scheduler),
        algorithms=[
            StagedFreezing(build_schedule(CONFIG.scheduler, CONFIG.staged_freezing, CONFIG.optimizer)),
            guard,
            SpoilWeight(spoiled),
        ],
        callbacks=[recorder],
        max_duration="2ep",
        device="cpu",
        device_train_microbatch_size=2,
        progress_bar=False,
        seed=1,
        load_path=load_path,
        save_folder=str(folder),
        save_interval="2ba",
        save_filename="ba{batch}.pt",
        save_overwrite=True,
    )
    trainer.fit()
    rates = trainer.state.schedulers[0].base_lrs
    trainer.close()
    return recorder, guard, rates


# In the first batch of a stage: its groups thaw at 3, vision is frozen from 5 and thaws at 7.
@pytest.mark.parametrize("spoiled", [3, 5, 7])
def test_rolled_back_over_the_start_of_a_stage_and_resumed(tmp_path: Path, spoiled: int):
    whole, guard, rates = train(tmp_path / "whole", spoiled)
    assert guard.num_rollbacks == 1 and guard.snapshot.batch == 6
    assert differing(whole.parts[spoiled + 1], whole.parts[spoiled - 1]) == []  # where the snapshot was taken
    assert rates == pytest.approx([0.3e-3] * 3 + [0.6e-3] * 2)
    for batch in (2, 4, 6):
        found, again, same = train(tmp_path / "part", spoiled, f"{tmp_path}/whole/ba{batch}.pt")
        assert differing(found.parts[-1], whole.parts[-1]) == []
        assert again.state_dict()["state"] == guard.state_dict()["state"] and same == rates
