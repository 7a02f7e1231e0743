"""A tiny float64 model under Composer's Trainer and the guard, on batches given as a list."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from composer import Algorithm, Callback, Event, Logger, State, Trainer
from composer.core import DataSpec
from composer.models import ComposerModel
from composer.optim import ConstantScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from recipe.algorithms.nan_rollback import NaNRollback
from recipe.config import NaNRollbackConfig

TinyBatch = dict[str, Any]


class TinyModel(ComposerModel):
    """Two layers in two parameter groups, and a buffer that training moves."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.seen = torch.zeros(())
        self.model.register_buffer("seen", self.seen)

    def forward(self, batch: TinyBatch) -> Tensor:
        """Batch → predictions."""
        if self.training:
            self.seen += 1
        return self.model(batch["x"])

    def loss(self, outputs: Tensor, batch: TinyBatch) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`loss_root` is finite at 0, but its gradient is not."""
        fit = (outputs - batch["y"]).square().mean() * batch["scale"]
        root = (batch["root"] * outputs.sum()).abs().sqrt() if "root" in batch else outputs.sum() * 0
        return {"loss_fit": fit, "loss_root": root, "total": fit + root}


def make_batch(index: int, scale: float = 1.0, **values: Any) -> TinyBatch:
    """Four samples named after the batch; `values` override its entries."""
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    names = [SimpleNamespace(id=f"{index}-{row}") for row in range(4)]
    return {"x": x, "y": x.sum(1, keepdim=True), "scale": scale, "samples": names, **values}


def make_loader(batches: Sequence[TinyBatch]) -> DataSpec:
    """One epoch is the list; a microbatch is two samples."""

    def split(batch: TinyBatch, microbatch_size: int | float) -> list[TinyBatch]:
        return [
            {name: value[rows] if name in ("x", "y", "samples") else value for name, value in batch.items()}
            for rows in (slice(0, 2), slice(2, 4))
        ]

    loader = DataLoader(list(batches), batch_size=None, collate_fn=lambda batch: batch)  # pyright: ignore
    return DataSpec(loader, split_batch=split, get_num_samples_in_batch=lambda batch: len(batch["samples"]))


class Do(Callback):
    """Calls a function at an event of some batches."""

    def __init__(self, event: Event, batches: Sequence[int], function: Callable[[State], None]):
        self.event, self.batches, self.function = event, batches, function

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """At the event."""
        if event is self.event and int(state.timestamp.batch) in self.batches:
            self.function(state)


class DoBefore(Algorithm):
    """The same, before the guard sees the event."""

    def __init__(self, event: Event, batches: Sequence[int], function: Callable[[State], None]):
        self.event, self.batches, self.function = event, batches, function

    def match(self, event: Event, state: State) -> bool:
        """At the event of those batches."""
        return event is self.event and int(state.timestamp.batch) in self.batches

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Calls it."""
        self.function(state)


def make_optimizer(model: TinyModel) -> torch.optim.AdamW:
    """Group `second` comes twice, with and without weight decay."""
    first, second = model.model[0], model.model[2]
    assert isinstance(second, nn.Linear)
    return torch.optim.AdamW(
        [
            {"params": list(first.parameters()), "name": "first"},
            {"params": [second.weight], "name": "second", "weight_decay": 0.1},
            {"params": [second.bias], "name": "second", "weight_decay": 0.0},
        ],
        lr=0.05,
    )


def make_trainer(
    batches: Sequence[TinyBatch],
    folder: Path,
    config: NaNRollbackConfig | None = None,
    clip_norm: float | None = 1.0,
    extras: Sequence[Callback | Algorithm] = (),
    **trainer: Any,
) -> tuple[Trainer, NaNRollback]:
    """A run over the batches; `extras` beside the guard."""
    guard = NaNRollback(config or NaNRollbackConfig(snapshot_interval="1ba"), clip_norm, folder)
    model = TinyModel()
    settings: dict[str, Any] = {
        "max_duration": f"{len(batches)}ba",
        "schedulers": ConstantScheduler(),
        "device_train_microbatch_size": 2,
        "progress_bar": False,
        "device": "cpu",
        "seed": 1,
        **trainer,
    }
    made = Trainer(
        model=model,
        train_dataloader=make_loader(batches),
        optimizers=make_optimizer(model),
        algorithms=_around(guard, [item for item in extras if isinstance(item, DoBefore)]),
        callbacks=[item for item in extras if isinstance(item, Callback)],
        **settings,
    )
    return made, guard


def _around(guard: NaNRollback, extras: Sequence[DoBefore]) -> list[Algorithm]:
    """Composer calls algorithms in this order, but in the reverse one after forward, loss and backward pass."""
    after = [item for item in extras if item.event.name.startswith("AFTER_")]
    return [*(item for item in extras if item not in after), guard, *after]


def train(batches: Sequence[TinyBatch], folder: Path, **keywords: Any) -> tuple[Trainer, NaNRollback]:
    """`make_trainer`, then `fit`."""
    trainer, guard = make_trainer(batches, folder, **keywords)
    trainer.fit()
    trainer.close()
    return trainer, guard


def trained_state(trainer: Trainer) -> dict[str, Tensor]:
    """Weights and optimizer state, by name; without the buffer, which counts skipped batches too."""
    optimizer = trainer.state.optimizers[0]
    found = {}
    for name, parameter in trainer.state.model.named_parameters():
        found[name] = parameter.detach().clone()
        for key, value in optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value.clone()
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different, different
