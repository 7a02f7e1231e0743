"""One training step of each case through Composer's Trainer: `composer -n 2 tests/distributed/one_step.py TINY OUT`.

Every rank writes OUT/CASE-RANK.pt: gradients, its share of each loss term, and the logged terms.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Logger, State, Trainer
from composer.core import DataSpec
from composer.utils import dist
from torch import Tensor

from recipe.config import OptimizerConfig
from recipe.data.loader import (
    collate_microbatches,
    get_num_samples_in_batch,
    get_num_tokens_in_batch,
    split_batch,
)
from recipe.optim import build_optimizer
from tests.tiny_cases import collator, make_config, make_examples, make_model


@dataclass(frozen=True)
class Case:
    """Which samples each rank reads of one global batch, and how it cuts them."""

    shares: tuple[list[str], list[str]]
    layout: str
    microbatch_size: int


CASES = {
    "padded": Case((["two", "text", "crowded"], ["unannotated", "empty", "one"]), "standard", 3),
    "packed": Case((["two", "text", "crowded"], ["unannotated", "empty", "one"]), "packed", 2),
    "text_only_rank": Case((["text", "text"], ["two", "one"]), "standard", 1),
    "uneven_microbatches": Case((["two", "one", "empty", "text", "crowded"], ["unannotated", "two"]), "packed", 1),
}


class Recorder(Callback):
    """Keeps what the step computed, before the optimizer moves."""

    def __init__(self):
        self.losses: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def after_loss(self, state: State, logger: Logger) -> None:
        """Composer logs in float32: keep the terms themselves."""
        del logger
        assert isinstance(state.loss, dict)
        for name, value in state.loss.items():
            self.losses[name] = self.losses.get(name, torch.zeros(())) + value.detach()

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Gradients of the whole global batch."""
        del logger
        named = ((name.removeprefix("module."), value.grad) for name, value in state.model.named_parameters())
        self.gradients = {name: gradient.clone() for name, gradient in named if gradient is not None}


def run_case(case: Case, checkpoint: str) -> dict[str, Any]:
    """One step; this rank's record of it."""
    config = make_config(checkpoint)
    examples = make_examples(config)
    share = [examples[name] for name in case.shares[dist.get_global_rank()]]
    microbatches = collate_microbatches(share, collator(case.layout), case.microbatch_size)
    loader = DataSpec(
        [microbatches],
        split_batch=split_batch,
        get_num_samples_in_batch=get_num_samples_in_batch,
        get_num_tokens_in_batch=get_num_tokens_in_batch,
    )
    model = make_model(config)
    recorder = Recorder()
    trainer = Trainer(
        model=model,
        train_dataloader=loader,
        optimizers=build_optimizer(model, OptimizerConfig()),
        callbacks=[recorder],
        max_duration="1ba",
        device="cpu",
        precision="fp32",
        device_train_microbatch_size=case.microbatch_size,
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        seed=1,
    )
    trainer.fit()
    logged = {name: float(value) for name, value in (trainer.state.total_loss_dict or {}).items()}
    weights = {
        name.removeprefix("module."): value.detach().clone() for name, value in trainer.state.model.named_parameters()
    }
    trainer.close()
    return {"losses": recorder.losses, "gradients": recorder.gradients, "logged": logged, "weights": weights}


def main() -> None:
    """Runs all cases."""
    checkpoint, out = sys.argv[1:]
    dist.initialize_dist("cpu")
    for name, case in CASES.items():
        torch.save(run_case(case, checkpoint), Path(out, f"{name}-{dist.get_global_rank()}.pt"))


if __name__ == "__main__":
    main()
