"""Freeze and thaw parameter groups in stages, and set the learning rate of the others."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from composer import Algorithm, Event, Logger, State
from composer.utils import dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from recipe.config import NEW_RUN
from recipe.optim.groups import begin_moments, local, named_groups, num_parameters
from recipe.optim.schedule import Schedule, lr_factor, stage_factor

log = logging.getLogger(__name__)

_FIXED_AT_START = ("initial_lr", "weight_decay", "betas", "eps")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 24  # elements: torch sums narrow integers in a 64-bit copy of them


class StagedFreezing(Algorithm):
    """Freeze and thaw parameter groups between steps, and set the learning rate of every step.

    A frozen group has `requires_grad` False and no gradient: autograd keeps nothing for it, and AdamW neither moves,
    decays nor counts it. Its Adam state stays; a group that never trained starts from zeros, allocated before the
    first step because Composer loads a checkpoint only into an optimizer with state for all its parameters. So a frozen
    group costs the memory of a trained one; a group with `lr` 0 does not.

    Nothing is saved, since all follows from the time. Composer's own scheduler stays for its base rates, which
    checkpoints hold and rollbacks cut; alone it would lag one batch. Logs `lr/{group}` per step.

    At the first step of a run and of every stage it logs a table of the groups and checks that each trainable parameter
    is in one optimizer group, that the step changes no bit of the frozen ones, and that it moves the others.
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self._factors: dict[str, float | None] = {}
        self._unchecked: set[str] = set()
        self._check: MovementCheck | None = None
        self._configured: list[dict[str, Any]] = []

    @property
    def find_unused_parameters(self) -> bool:
        """Return whether DDP must expect parameters without a gradient: all are trainable when it wraps them."""
        return self.schedule.freezes

    def match(self, event: Event, state: State) -> bool:
        """Match the events that `apply` handles."""
        return event in (Event.BEFORE_LOAD, Event.FIT_START, Event.BATCH_START, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Set rates and stages at a batch's start; check the step at its end.

        Raises:
            RuntimeError: On all ranks: nothing is trainable, or a check failed.
        """
        optimizer = state.optimizers[0]
        if event is Event.BEFORE_LOAD:
            self._configured = _fixed_settings(optimizer)
        elif event is Event.FIT_START:
            self._begin_fit(state)
        elif event is Event.BATCH_START:
            self._begin_batch(state, logger)
        elif self._check is not None:
            self._unchecked -= self._check.finish(int(state.timestamp.batch) - 1, _rates(optimizer))
            self._check = None

    def _begin_fit(self, state: State) -> None:
        optimizer = state.optimizers[0]
        text = "group %s: %s is %s in the configuration but %s in the checkpoint (after any rollbacks), which applies; "
        text += f"to change it, start a new run from the weights: {NEW_RUN}"
        for asked, loaded in zip(self._configured, _fixed_settings(optimizer), strict=False):
            for name in _FIXED_AT_START:
                if asked[name] != loaded[name] and dist.get_global_rank() == 0:
                    log.warning(text, asked["name"], name.removeprefix("initial_"), asked[name], loaded[name])
        begin_moments(optimizer)
        # So that what the scheduler sets, and others read after a step, is that step's rate.
        _scheduler(state).lr_lambdas = [
            lambda _, name=group["name"]: lr_factor(self.schedule, name, state) for group in optimizer.param_groups
        ]
        self._factors = {}

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
        if self.schedule.stages:
            table = _table(state, self._factors, rates)  # collective
            if dist.get_global_rank() == 0:
                time = state.timestamp
                log.info("stage from batch %d (epoch %d) on:\n%s", time.batch.value, time.epoch.value, table)
        if not self._unchecked:
            raise RuntimeError(
                f"all groups are frozen from batch {int(state.timestamp.batch)} on: "
                "leave one trained in staged_freezing.groups"
            )
        check_membership(state.model, optimizer)


def _scheduler(state: State) -> LambdaLR:
    (scheduler,) = state.schedulers
    assert isinstance(scheduler, LambdaLR), "the Trainer got one of Composer's schedulers"
    return scheduler


def _rates(optimizer: Optimizer) -> dict[str, float]:
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}


def _fixed_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    def plain(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value  # a checkpoint of FSDP2 has betas as a list

    names = ("name", *_FIXED_AT_START)
    return [{name: plain(group[name]) for name in names} for group in optimizer.param_groups]


def _table(state: State, factors: dict[str, float | None], rates: dict[str, float]) -> str:
    """Return one line per group; an all-reduce under FSDP."""
    counts, num_rest = num_parameters(state)
    lines = [f"{'group':<11} {'parameters':>14} {'trainable':>14} {'factor':>8} {'lr':>10}"]
    for name, count in counts.items():
        factor = factors[name]
        stage = "frozen" if factor is None else f"{factor:g}"
        lines.append(f"{name:<11} {count:>14,} {0 if factor is None else count:>14,} {stage:>8} {rates[name]:>10.3g}")
    if num_rest:
        lines.append(f"{'(no group)':<11} {num_rest:>14,} {0:>14,} {'frozen':>8} {0:>10}")
    return "\n".join(lines)


def plain_name(name: str) -> str:
    """Return a parameter's name without the prefixes that DDP and FSDP1 add."""
    return name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")


def check_membership(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise RuntimeError if a trainable parameter is not in exactly one optimizer group."""
    counts = Counter(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    for name, parameter in model.named_parameters():
        count = counts[id(parameter)]
        if parameter.requires_grad and count != 1:
            raise RuntimeError(
                f"{plain_name(name)} is trainable, but {count} optimizer groups hold it instead of one: build the "
                "optimizer with recipe.optim.groups.build_optimizer after the last change to the model"
            )


class MovementCheck:
    """Compare parameters before and after one step on all ranks: frozen ones bit-equal, trained groups moved.

    Made at the start of the batch. Reads the weights twice and copies none.
    """

    def __init__(self, state: State, trained: set[str]):
        names = {id(parameter): plain_name(name) for name, parameter in state.model.named_parameters()}
        groups = named_groups(state.optimizers[0])
        self.trained = trained
        # AdamW's step shrinks with a gradient below eps, which may be the rounding of a gradient that is 0.
        self.negligible = {group["name"]: group["eps"] for group in state.optimizers[0].param_groups}
        self.parameters: list[tuple[str, str, Parameter]] = [
            (group, names[id(parameter)], parameter)
            for group, parameters in groups.items()
            for parameter in parameters
            if group in trained or not parameter.requires_grad
        ]
        self.sums = bit_sums([parameter for _, _, parameter in self.parameters])

    def finish(self, batch: int, rates: Mapping[str, float]) -> set[str]:
        """Return the trained groups that could be checked: those with a gradient other than 0.

        They are none if the gradients were removed, so that the optimizer may have made no step. One all-reduce and
        one wait for the device.

        Raises:
            RuntimeError: On all ranks: a frozen parameter changed, or a whole group with a gradient did not.
        """
        parameters = [parameter for _, _, parameter in self.parameters]
        changed = (bit_sums(parameters) != self.sums).double()
        found = torch.stack([changed, _greatest_gradients(parameters)])
        dist.all_reduce(found, reduce_operation="MAX")
        moved, gradients = found.tolist()
        if max(gradients) <= 0:
            return set()
        for (group, name, parameter), has_moved in zip(self.parameters, moved, strict=True):
            if has_moved and not parameter.requires_grad:
                raise RuntimeError(f"batch {batch} changed {name}, though the group {group} is frozen in this stage")
        if not all(map(isfinite, gradients)):
            return set()
        judged: set[str] = set()
        for group in sorted(self.trained):
            rows = [index for index, entry in enumerate(self.parameters) if entry[0] == group]
            if not any(gradients[index] > 0 for index in rows):
                continue  # the head, if no image of the batch has annotations
            judged.add(group)
            # Zero gradients are common in the first steps: a layer initialized to zero passes none back.
            least = self.negligible[group]
            still = [
                self.parameters[index][1]
                for index in rows
                if not moved[index] and not 0 <= gradients[index] <= least  # below 0: it has none
            ]
            if not any(moved[index] for index in rows):
                raise RuntimeError(
                    f"batch {batch} moved no parameter of the group {group}, though it has a gradient: the learning "
                    f"rate {rates[group]:g} is lost in the rounding of {self.parameters[rows[0]][2].dtype} weights"
                )
            if still and dist.get_global_rank() == 0:
                some = ", ".join(still[:5]) + (", ..." if len(still) > 5 else "")
                text = "batch %d did not move %d parameters of the group %s: %s. They have no gradient, or their "
                log.warning(text + "update is lost in rounding", batch, len(still), group, some)
        return judged


@torch.no_grad()
def bit_sums(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of the bits of this rank's part of each tensor, as integers: (n,) int64, wrapping around."""
    sums = []
    for tensor in map(local, tensors):
        bits = tensor.detach().view(_INTEGERS[tensor.element_size()]).flatten()
        sums.append(torch.stack([chunk.sum(dtype=torch.int64) for chunk in bits.split(_CHUNK)]).sum())
    return torch.stack(sums)


def _greatest_gradients(parameters: Sequence[Parameter]) -> Tensor:
    """Return the greatest absolute entry of this rank's part of each gradient: (n,), -1 without one, inf for NaN."""
    result = torch.full((len(parameters),), -1.0, dtype=torch.float64, device=local(parameters[0]).device)
    for index, parameter in enumerate(parameters):
        if parameter.grad is not None and local(parameter.grad).numel():
            result[index] = local(parameter.grad).abs().max()
    return result.nan_to_num(nan=torch.inf, posinf=torch.inf)
