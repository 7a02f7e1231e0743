"""The joint model, hit on the last rank alone: `composer -n N tests/distributed/nan_run.py TINY OUT MODE`.

MODE is ddp, fsdp1, fsdp2, or on four ranks hybrid1 or hybrid2, or with adapters in the trunk ddp_lora or fsdp2_lora.
Every rank writes OUT/MODE-CASE-RANK.pt: its part of the weights and of the optimizer's state, what the guard counted,
and whether the run gave up; the audit goes to OUT/MODE-CASE/quarantine.jsonl.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer import Algorithm, Event, Logger, State, Trainer
from composer.core import DataSpec
from composer.optim import ConstantScheduler
from composer.utils import dist
from torch import Tensor

from recipe.algorithms.nan_rollback import NaNRollback, TrainingDiverged
from recipe.config import NaNRollbackConfig, OptimizerConfig
from recipe.data.loader import get_num_samples_in_batch, get_num_tokens_in_batch
from recipe.losses.counts import split_batch
from recipe.optim.groups import build_optimizer, local
from tests.distributed.fsdp_shim import install, parallelism_of
from tests.launches.launch import leave
from tests.support.staged_cases import ADAPTED_RATES
from tests.support.tiny_cases import ADAPTED, make_config, make_examples, make_model, microbatches_of

NAN = float("nan")
HIT = 2  # the bad batch
# Of each rank; two microbatches each, of four ranks one.
BATCHES = (
    (["two", "text"], ["one", "empty"]),
    (["crowded", "one"], ["unannotated", "two"]),
    (["empty", "two"], ["one", "crowded"]),
    (["text", "one"], ["two", "two"]),
)
OPTIMIZER = OptimizerConfig(lr_vision=1e-3, lr_merger=1e-3, lr_llm=1e-3, lr_adapter=1e-3, lr_detection=1e-3)


def hit_loss(state: State) -> None:
    """One term, of both microbatches."""
    assert isinstance(state.loss, dict)
    state.loss["loss_giou"] = state.loss["loss_giou"] * NAN


def hit_loss_gradient(state: State) -> None:
    """The loss stays finite, the gradient becomes NaN on all ranks, as they average it."""
    assert isinstance(state.loss, dict)
    state.loss["total"] = state.loss["total"] + (0.0 * state.loss["total"]).sqrt()


def hit_gradient(state: State) -> None:
    """On this rank alone, after the gradients were averaged."""
    gradients = [local(p.grad) for p in state.model.parameters() if p.grad is not None]
    next(gradient for gradient in gradients if gradient.numel()).flatten()[0] = float("inf")


@torch.no_grad()
def hit_weight(state: State) -> None:
    """On this rank alone: what a broken memory would do."""
    trained = (parameter for parameter in state.model.parameters() if parameter.requires_grad)
    parameter = next(part for part in map(local, trained) if part.numel())
    parameter.view(-1)[0] = NAN


def hit_outputs(state: State) -> None:
    """The boxes of the head are NaN when the matcher gets them, in every microbatch of this step."""
    (head,) = [module for name, module in state.model.named_modules() if name.endswith("detection_head")]

    def spoil(module: Any, inputs: Any, outputs: Any) -> Any:
        if int(state.timestamp.batch) == HIT:
            outputs[0].pred_boxes = outputs[0].pred_boxes * NAN
        return outputs

    head.register_forward_hook(spoil)


def cut(state: State) -> None:
    """What one rollback leaves, without one."""
    scheduler = state.schedulers[0]
    scheduler.base_lrs = [lr * 0.5 for lr in scheduler.base_lrs]
    for group in state.optimizers[0].param_groups:
        group["lr"] *= 0.5
    guard = state.algorithms[-1] if isinstance(state.algorithms[-1], NaNRollback) else state.algorithms[0]
    assert isinstance(guard, NaNRollback)
    guard.clip_scale *= 0.5


class Hit(Algorithm):
    """Calls a function at an event of batch `HIT`, before the guard sees it; on the last rank, or on all."""

    def __init__(self, event: Event, function: Callable[[State], None], everywhere: bool = False):
        self.event, self.function = event, function
        self.is_here = everywhere or dist.get_global_rank() == dist.get_world_size() - 1

    def match(self, event: Event, state: State) -> bool:
        """Whether it is now."""
        return self.is_here and event is self.event and int(state.timestamp.batch) == HIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Calls it."""
        self.function(state)


CASES: dict[str, tuple[Event, Callable[[State], None]]] = {
    "loss": (Event.AFTER_LOSS, hit_loss),
    "loss_gradient": (Event.AFTER_LOSS, hit_loss_gradient),
    "gradient": (Event.AFTER_TRAIN_BATCH, hit_gradient),
    "outputs": (Event.BATCH_START, hit_outputs),
    "weight": (Event.BATCH_START, hit_weight),
    "given_up": (Event.BATCH_START, hit_weight),
}


def run_case(name: str, checkpoint: str, out: Path, mode: str) -> dict[str, Any]:
    """`clean` and `clean_cut` never hold the bad batch; this rank's record."""
    folder = out / f"{mode}-{name}"
    mode, _, lora = mode.partition("_")
    config = make_config(checkpoint, **(ADAPTED if lora else {}))
    examples = make_examples(config)
    rank = dist.get_global_rank()
    is_clean = name.startswith("clean")
    num_samples = 4 // dist.get_world_size()
    shares = [
        [*shares[0], *shares[1]][rank * num_samples :][:num_samples]
        for index, shares in enumerate(BATCHES)
        if not (is_clean and index == HIT)
    ]
    microbatches = [microbatches_of([examples[key] for key in share], "packed", 1) for share in shares]
    hits = [] if is_clean else [Hit(*CASES[name])]
    if name == "clean_cut":
        hits = [Hit(Event.BATCH_START, cut, everywhere=True)]
    settings = NaNRollbackConfig(snapshot_interval="1ba", max_rollbacks=0 if name == "given_up" else 5)
    model = make_model(config)
    guard = NaNRollback(settings, 1.0, folder)
    loader = DataSpec(
        microbatches,
        split_batch=split_batch,
        get_num_samples_in_batch=get_num_samples_in_batch,
        get_num_tokens_in_batch=get_num_tokens_in_batch,
    )
    trainer = Trainer(
        model=model,
        parallelism_config=parallelism_of(model, mode),
        train_dataloader=loader,
        optimizers=build_optimizer(model, ADAPTED_RATES if lora else OPTIMIZER),
        schedulers=ConstantScheduler(),
        algorithms=[guard, *hits] if name not in ("weight", "given_up", "clean_cut") else [*hits, guard],
        max_duration="1ep",
        device="cpu",
        precision="fp32",
        device_train_microbatch_size=1,
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        seed=1,
    )
    message = ""
    try:
        trainer.fit()
    except TrainingDiverged as error:
        message = str(error)
    record = {
        "state": local_state(trainer.state),
        "counts": (guard.num_skipped, guard.num_rollbacks, guard.clip_scale),
        "blamed": guard.quarantine.counts,
        "message": message,
    }
    trainer.close()
    return record


def local_state(state: State) -> dict[str, Tensor]:
    """This rank's part of weights and optimizer state."""
    found = {}
    for name, parameter in state.model.named_parameters():
        found[name] = local(parameter.detach()).clone()
        for key, value in state.optimizers[0].state.get(parameter, {}).items():
            found[f"{name}.{key}"] = local(value).clone()
    return found


def main() -> None:
    """Runs all cases."""
    checkpoint, out, mode = sys.argv[1:]
    dist.initialize_dist("cpu")
    install()
    for name in ("clean", "clean_cut", *CASES):
        torch.save(run_case(name, checkpoint, Path(out), mode), Path(out, f"{mode}-{name}-{dist.get_global_rank()}.pt"))
    leave()


if __name__ == "__main__":
    main()
