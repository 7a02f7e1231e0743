"""One training step of each case through Composer's Trainer: `composer -n 2 tests/distributed/one_step.py TINY OUT MODE`.

MODE is ddp, fsdp1 or fsdp2. Every rank writes OUT/MODE-CASE-RANK.pt: gradients, its share of each loss term, and the
logged terms.
"""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Logger, State, Trainer
from composer.core import DataSpec
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from recipe.config import OptimizerConfig
from recipe.data.loader import (
    collate_microbatches,
    get_num_samples_in_batch,
    get_num_tokens_in_batch,
    split_batch,
)
from recipe.optim import build_optimizer
from recipe.parallel import build_parallelism, mark_units
from tests.distributed.fsdp_shim import install
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
        with whole_parameters(state.model, with_grads=True):
            self.gradients = {
                plain_name(name): whole(value.grad).clone()
                for name, value in state.model.named_parameters()
                if value.grad is not None
            }


def whole_parameters(model: nn.Module, with_grads: bool = False) -> AbstractContextManager[Any]:
    """Gathers what FSDP1 has sharded; nothing to do for DDP and FSDP2."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return FullyShardedDataParallel.summon_full_params(model, with_grads=with_grads)
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """Gathers what FSDP2 has sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_name(name: str) -> str:
    """A parameter's name in the model that nothing wraps."""
    return name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")


def run_case(case: Case, checkpoint: str, mode: str) -> dict[str, Any]:
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
    parallelism = None
    if mode != "ddp":
        version = int(mode.removeprefix("fsdp"))
        mark_units(model, version)
        parallelism = build_parallelism({"fsdp": {"mixed_precision": "FULL"}}, version)
    trainer = Trainer(
        model=model,
        parallelism_config=parallelism,
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
    with whole_parameters(trainer.state.model):
        weights = {
            plain_name(name): whole(value.detach()).clone() for name, value in trainer.state.model.named_parameters()
        }
    trainer.close()
    return {"losses": recorder.losses, "gradients": recorder.gradients, "logged": logged, "weights": weights}


def main() -> None:
    """Runs all cases."""
    checkpoint, out, mode = sys.argv[1:]
    dist.initialize_dist("cpu")
    install()
    for name, case in CASES.items():
        torch.save(run_case(case, checkpoint, mode), Path(out, f"{mode}-{name}-{dist.get_global_rank()}.pt"))
    dist.barrier()
    # Gloo of torch 2.7 can wait for ever in its destructor.
    os._exit(0)


if __name__ == "__main__":
    main()
