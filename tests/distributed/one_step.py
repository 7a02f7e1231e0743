"""A training step of each case through Composer's Trainer: `composer -n N tests/distributed/one_step.py TINY OUT MODE`.

MODE is ddp, fsdp1 or fsdp2; names of cases may follow. Every rank writes OUT/MODE-CASE-RANK.pt: gradients, its share of
each loss term, the logged terms, and how far adapters have moved its first microbatch's answers from the base.
"""

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Logger, State, Trainer
from composer.core import DataSpec
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from recipe.algorithms.staged_freezing import plain_name
from recipe.config import OptimizerConfig
from recipe.data.loader import get_num_samples_in_batch, get_num_tokens_in_batch
from recipe.joint import JointModel
from recipe.losses.counts import split_batch
from recipe.models.retention import divergence_from_base
from recipe.optim.groups import build_optimizer, local
from recipe.schema import Batch
from tests.distributed.fsdp_shim import install, parallelism_of
from tests.launches.launch import leave
from tests.support.float64 import compute_in_float64
from tests.support.staged_cases import ADAPTED_RATES
from tests.support.tiny_cases import ADAPTED, ALL_SWITCHES, make_config, make_examples, make_model, microbatches_of

MIXED = (["two", "text", "crowded", "several"], ["unannotated", "in_turns", "empty", "one"])
TEXT_ONLY_RANK = (["text", "text"], ["two", "one"])


@dataclass(frozen=True)
class Case:
    """Which samples each rank reads of one global batch, how it cuts them, and how the model differs.

    Attributes:
        shares: Names of the samples of each rank.
        layout: Of the collator.
        microbatch_size: Samples.
        model: Changed keys of the section `model`.
        sections: Changed keys of other sections.
        untied: The output matrix is not the token embedding.
        optimizer: Rates of 0 freeze.
        only_ddp: DDP waits for other ranks after the last microbatch; FSDP gathers weights in each.
    """

    shares: tuple[list[str], list[str]]
    layout: str = "standard"
    microbatch_size: int = 1
    model: dict[str, Any] = field(default_factory=dict[str, Any])
    sections: dict[str, Any] = field(default_factory=dict[str, Any])
    untied: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    only_ddp: bool = False

    def shares_of(self, world_size: int) -> list[list[str]]:
        """What each of two or more ranks reads: as many parts of each of the two shares."""
        parts = world_size // len(self.shares)
        return [
            share[part * len(share) // parts :][: len(share) // parts] for share in self.shares for part in range(parts)
        ]


CASES = {
    "padded": Case(MIXED, microbatch_size=4),
    "packed": Case(MIXED, "packed", 2),
    "text_only_rank": Case(TEXT_ONLY_RANK),
    "checkpointed": Case(TEXT_ONLY_RANK, model={"gradient_checkpointing": True}),
    "all_switches": Case(MIXED, "packed", 2, sections=ALL_SWITCHES),
    "all_switches_text_only_rank": Case(TEXT_ONLY_RANK, sections=ALL_SWITCHES),
    "all_switches_frozen_llm": Case(TEXT_ONLY_RANK, sections=ALL_SWITCHES, optimizer=OptimizerConfig(lr_llm=0.0)),
    "untied": Case(MIXED, "packed", 3, untied=True),
    "frozen_llm": Case(TEXT_ONLY_RANK, optimizer=OptimizerConfig(lr_llm=0.0)),
    "frozen_vision": Case(TEXT_ONLY_RANK, optimizer=OptimizerConfig(lr_vision=0.0, lr_merger=0.0)),
    "frozen_backbone": Case(TEXT_ONLY_RANK, optimizer=OptimizerConfig(lr_vision=0.0, lr_merger=0.0, lr_llm=0.0)),
    "frozen_head": Case(
        TEXT_ONLY_RANK,
        model={"gradient_checkpointing": True},
        optimizer=OptimizerConfig(lr_llm=0.0, lr_adapter=0.0, lr_detection=0.0),
    ),
    "adapted": Case(MIXED, "packed", 2, sections=ADAPTED, optimizer=ADAPTED_RATES),
    "adapted_text_only_rank": Case(
        TEXT_ONLY_RANK, model={"gradient_checkpointing": True}, sections=ADAPTED, optimizer=ADAPTED_RATES
    ),
    "adapted_language_alone": Case(
        TEXT_ONLY_RANK, sections=ADAPTED, optimizer=replace(ADAPTED_RATES, lr_merger=0.0, lr_lora_vision=0.0)
    ),
    "in_nf4": Case(MIXED, "packed", 2, {"frozen_dtype": "nf4"}, ADAPTED, optimizer=ADAPTED_RATES, only_ddp=True),
    "uneven_microbatches": Case(
        (["two", "one", "empty", "text", "crowded"], ["unannotated", "two"]), "packed", only_ddp=True
    ),
}


def make_case_model(case: Case, checkpoint: str) -> JointModel:
    """The case's model in float64, the same in every process."""
    model = make_model(make_config(checkpoint, model=case.model, **case.sections))
    if case.untied:
        head: Any = model.model.vlm.hf_model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().flip(0).clone())
    return model


def cases_of(mode: str) -> dict[str, Case]:
    """The cases that `mode` can run."""
    return {name: case for name, case in CASES.items() if mode == "ddp" or not case.only_ddp}


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
        self.gradients = whole_gradients(state.model)


def whole_parameters(model: nn.Module) -> AbstractContextManager[Any]:
    """Gathers what FSDP1 has sharded; nothing to do for DDP and FSDP2."""
    return FullyShardedDataParallel.summon_full_params(model) if is_fsdp1(model) else nullcontext()


def is_fsdp1(model: nn.Module) -> bool:
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter that has one, gathered from all ranks."""
    if not is_fsdp1(model):
        return {
            plain_name(name): whole(parameter.grad).clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    # FSDP1's own gathering of gradients fails in float64 where one rank's part of a unit is frozen (torch 2.7).
    with whole_parameters(model):
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    unit: Any = FullyShardedDataParallel.fsdp_modules(model)[0]
    num_shards = unit.process_group.size()
    gathered = {}
    for name, parameter in model.named_parameters():
        parts = dist.all_gather_object(None if parameter.grad is None else parameter.grad.flatten())
        found = [part for part in parts[:num_shards] if part is not None]  # other groups of ranks have the same
        if found:
            gathered[plain_name(name)] = torch.cat(found).view(shapes[name])
    return gathered


def whole(tensor: Tensor) -> Tensor:
    """Gathers what FSDP2 has sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run_case(case: Case, checkpoint: str, mode: str) -> dict[str, Any]:
    """One step; this rank's record of it."""
    examples = make_examples(make_config(checkpoint))
    share = [examples[name] for name in case.shares_of(dist.get_world_size())[dist.get_global_rank()]]
    microbatches = microbatches_of(share, case.layout, case.microbatch_size)
    loader = DataSpec(
        [microbatches],
        split_batch=split_batch,
        get_num_samples_in_batch=get_num_samples_in_batch,
        get_num_tokens_in_batch=get_num_tokens_in_batch,
    )
    model = make_case_model(case, checkpoint)
    recorder = Recorder()
    trainer = Trainer(
        model=model,
        parallelism_config=parallelism_of(model, mode),
        train_dataloader=loader,
        optimizers=build_optimizer(model, case.optimizer),
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
    model.eval()
    moved = divergence_from_base(model.model, microbatches[0]) if "lora" in case.sections else None
    blind = losses_without_weights(model, trainer.state.optimizers[0], microbatches[0])
    trainer.close()
    return {
        "losses": recorder.losses,
        "gradients": recorder.gradients,
        "logged": logged,
        "weights": weights,
        "moved": moved,
        "blind": blind,
    }


@torch.no_grad()
def losses_without_weights(model: JointModel, optimizer: Optimizer, batch: Batch) -> Tensor:
    """The answers' losses, less those of equal logits, where all that is trained becomes 0 after an evaluation."""
    model.eval()
    model.eval_forward(batch)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            local(parameter.data).zero_()
    return model(batch).label_losses - math.log(model.model.vlm.text_config.vocab_size)


def main() -> None:
    """Runs all cases."""
    checkpoint, out, mode, *chosen = sys.argv[1:]
    dist.initialize_dist("cpu")
    install()
    compute_in_float64()
    for name in chosen or cases_of(mode):
        torch.save(run_case(CASES[name], checkpoint, mode), Path(out, f"{mode}-{name}-{dist.get_global_rank()}.pt"))
    leave()


if __name__ == "__main__":
    main()
