"""Stages of one run: which parameter groups are frozen when, and at which rate each of the others learns."""

import logging
from typing import Any

import torch
from composer import Algorithm, Event, Logger, State
from composer.utils import dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from recipe.algorithms.norms import is_sharded, local, named_groups
from recipe.algorithms.stage_checks import MovementCheck, check_membership
from recipe.schedule import Schedule, lr_factor, stage_factor

log = logging.getLogger(__name__)

_FIXED_AT_START = ("initial_lr", "weight_decay", "betas", "eps")


class StagedFreezing(Algorithm):
    """Freezes and thaws parameter groups between steps, and sets the learning rate of every step.

    A frozen group has `requires_grad` False and no gradient: autograd keeps nothing for it, and AdamW neither moves nor
    decays it nor counts its steps. Its Adam state rests; a group that never trained starts from zeros. Those zeros are
    made before the first step, since Composer loads a checkpoint only into an optimizer that has state for all it
    holds, so a frozen group takes the memory of a trained one (one with `lr` 0 does not).

    All follows from the time, so that nothing has to be saved. Composer's own scheduler stays for its base rates, which
    checkpoints hold and rollbacks cut; alone it would lag one batch. Logs `lr/{group}` at every step.

    At the first step of a run and of every stage a table of the groups is logged; and it is checked that each
    trainable parameter is in one optimizer group, that the step leaves every bit of the frozen ones, and that it moves
    the others.

    Args:
        schedule: Of every group.
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self._factors: dict[str, float | None] = {}
        self._unchecked: set[str] = set()
        self._check: MovementCheck | None = None
        self._configured: list[dict[str, Any]] = []

    @property
    def find_unused_parameters(self) -> bool:
        """All parameters are trainable when DDP wraps them, so it must expect some to get no gradient."""
        return self.schedule.freezes

    def match(self, event: Event, state: State) -> bool:
        """Whether there is something to do."""
        return event in (Event.BEFORE_LOAD, Event.FIT_START, Event.BATCH_START, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """See the class.

        Raises:
            RuntimeError: On all ranks: nothing is trainable, or a check failed.
        """
        optimizer = state.optimizers[0]
        if event is Event.BEFORE_LOAD:
            self._configured = _fixed_at_start(optimizer)
        elif event is Event.FIT_START:
            self._report_loaded_settings(optimizer)
            _make_missing_state(optimizer)
            self._take_over_scheduler(state)
            self._factors = {}
        elif event is Event.BATCH_START:
            self._begin_batch(state, logger)
        elif self._check is not None:
            self._unchecked -= self._check.finish(int(state.timestamp.batch) - 1, _rates(optimizer))
            self._check = None

    def _take_over_scheduler(self, state: State) -> None:
        # So that what it sets and what others read after a step is that step's rate.
        scheduler = _scheduler(state)
        names = [group["name"] for group in state.optimizers[0].param_groups]
        scheduler.lr_lambdas = [lambda _, name=name: lr_factor(self.schedule, name, state) for name in names]

    def _begin_batch(self, state: State, logger: Logger) -> None:
        optimizer, scheduler = state.optimizers[0], _scheduler(state)
        for group, base_lr in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = base_lr * lr_factor(self.schedule, group["name"], state)
        rates = _rates(optimizer)
        logger.log_metrics({f"lr/{name}": rate for name, rate in rates.items()})
        factors = {name: stage_factor(self.schedule.stages.get(name, ()), state) for name in rates}
        if factors != self._factors:
            self._factors = factors
            self._enter_stage(state, rates)
        due = {name for name in self._unchecked if rates[name] > 0}
        self._check = MovementCheck(state, due) if due else None

    def _enter_stage(self, state: State, rates: dict[str, float]) -> None:
        optimizer = state.optimizers[0]
        for name, parameters in named_groups(optimizer).items():
            for parameter in parameters:
                parameter.requires_grad_(self._factors[name] is not None)
                parameter.grad = None
        self._unchecked = {name for name, factor in self._factors.items() if factor is not None}
        table = _table(state, self._factors, rates)
        if dist.get_global_rank() == 0:
            time = state.timestamp
            log.info("stage from batch %d (epoch %d) on:\n%s", time.batch.value, time.epoch.value, table)
        if not self._unchecked:
            raise RuntimeError(
                f"all groups are frozen from batch {int(state.timestamp.batch)} on: mend staged_freezing.groups"
            )
        check_membership(state.model, optimizer)

    def _report_loaded_settings(self, optimizer: Optimizer) -> None:
        for asked, loaded in zip(self._configured, _fixed_at_start(optimizer), strict=False):
            for name in _FIXED_AT_START:
                if asked[name] != loaded[name] and dist.get_global_rank() == 0:
                    log.warning(
                        "group %s: %s is %s by the configuration but %s in the checkpoint (after any rollbacks), which "
                        "holds; to change it, start from the weights alone, with trainer.load_weights_only",
                        asked["name"],
                        name.removeprefix("initial_"),
                        asked[name],
                        loaded[name],
                    )


def _scheduler(state: State) -> LambdaLR:
    (scheduler,) = state.schedulers
    assert isinstance(scheduler, LambdaLR), "the Trainer was given one of Composer's schedulers"
    return scheduler


def _rates(optimizer: Optimizer) -> dict[str, float]:
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}


def _fixed_at_start(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{name: group[name] for name in ("name", *_FIXED_AT_START)} for group in optimizer.param_groups]


def _make_missing_state(optimizer: Optimizer) -> None:
    """Gives every parameter the state that AdamW would give it in its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # A rank may hold no part of a parameter under FSDP1, which saves no state of nothing.
            if not optimizer.state.get(parameter) and parameter.numel():
                optimizer.state[parameter] = {
                    "step": torch.tensor(0.0, dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }


def _table(state: State, factors: dict[str, float | None], rates: dict[str, float]) -> str:
    """One line a group. Collective under FSDP."""
    groups = named_groups(state.optimizers[0])
    held = {id(parameter) for parameters in groups.values() for parameter in parameters}
    rest = [parameter for parameter in state.model.parameters() if id(parameter) not in held]
    every = [*groups.values(), rest]
    parts = [sum(local(parameter).numel() for parameter in parameters) for parameters in every]
    sizes = torch.tensor(parts, device=local(next(state.model.parameters())).device)
    if is_sharded(state):
        dist.all_reduce(sizes)
    *counts, num_rest = sizes.tolist()
    lines = [f"{'group':<10} {'parameters':>14} {'trainable':>14} {'factor':>8} {'lr':>10}"]
    for name, count in zip(groups, counts, strict=True):
        factor = factors[name]
        stage = "frozen" if factor is None else f"{factor:g}"
        lines.append(f"{name:<10} {count:>14,} {0 if factor is None else count:>14,} {stage:>8} {rates[name]:>10.3g}")
    if num_rest:
        lines.append(f"{'(no group)':<10} {num_rest:>14,} {0:>14,} {'frozen':>8} {0:>10}")
    return "\n".join(lines)
