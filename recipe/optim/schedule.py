"""Schedule learning rates: each group's base curve times the factor of its current stage, or frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from composer import State, Time, TimeUnit
from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearWithWarmupScheduler,
)

from recipe.config import GROUPS, CurveConfig, OptimizerConfig, SchedulerConfig, StagedFreezingConfig
from recipe.rules import parse_duration, parse_stages


@dataclass(frozen=True)
class Stage:
    """Scale a group's learning rate from `start` on; None: frozen."""

    start: Time
    factor: float | None
    warmup: Time | None = None  # in the unit of `start`: the rate rises from 0 over that long


@dataclass(frozen=True)
class Schedule:
    """Hold every group's base curve, the stages of those that have any, and the groups of the trunk that ever learn."""

    curves: Mapping[str, ComposerScheduler]
    stages: Mapping[str, Sequence[Stage]]
    trunk: Sequence[str] = ()

    @property
    def freezes(self) -> bool:
        """Return whether any group is ever frozen."""
        return any(stage.factor is None for stages in self.stages.values() for stage in stages)


def build_schedule(scheduler: SchedulerConfig, staged: StagedFreezingConfig, optimizer: OptimizerConfig) -> Schedule:
    """Return the schedule that the sections describe; `optimizer` says which groups train at all."""
    curves = {group: build_curve(scheduler.groups.get(group, scheduler)) for group in GROUPS}
    stages = {
        group: [
            Stage(
                Time.from_timestring(entry.start),
                entry.factor,
                None if entry.warmup is None else Time.from_timestring(entry.warmup),
            )
            for entry in entries
        ]
        for group, entries in parse_stages(staged, optimizer).items()
    }
    return Schedule(curves, stages)


def build_curve(config: CurveConfig) -> ComposerScheduler:
    """Return Composer's scheduler of that name: a function of the training state."""
    t_warmup = config.t_warmup
    if (parse_duration(t_warmup) or (1.0, ""))[0] == 0:
        t_warmup = "0dur"  # none, in the unit of the run: Composer refuses another
    if config.name == "cosine":
        return CosineAnnealingWithWarmupScheduler(t_warmup=t_warmup, alpha_f=config.alpha_f)
    if config.name == "linear":
        return LinearWithWarmupScheduler(t_warmup=t_warmup, alpha_f=config.alpha_f)
    return ConstantWithWarmupScheduler(t_warmup=t_warmup)


def long_warmups(config: SchedulerConfig, max_duration: Time, batches_per_epoch: int) -> list[str]:
    """Return which warm-ups, by their key and value, are longer than the run, so that no full rate is reached."""
    factors = {TimeUnit.EPOCH: batches_per_epoch}
    curves = {f"scheduler.groups.{group}": curve for group, curve in config.groups.items()}
    found = []
    for where, curve in {"scheduler": config, **curves}.items():
        warmup = Time.from_timestring(curve.t_warmup)
        length = 1.0 if warmup.unit is TimeUnit.DURATION else max_duration.value * factors.get(max_duration.unit, 1)
        if warmup.value * factors.get(warmup.unit, 1) > length:
            found.append(f"{where}.t_warmup {curve.t_warmup}")
    return found


def lr_factor(schedule: Schedule, group: str, state: State) -> float:
    """Return the factor on a group's learning rate in the coming step; 0 while it is frozen."""
    stage = _current(schedule.stages.get(group, ()), state)
    if stage is None:
        return schedule.curves[group](state)
    return 0.0 if stage.factor is None else schedule.curves[group](state) * stage.factor * _warmed(stage, state)


def stage_factor(stages: Sequence[Stage], state: State) -> float | None:
    """Return the factor of the latest stage whose start has passed, 1 before the first; None: frozen."""
    stage = _current(stages, state)
    return 1.0 if stage is None else stage.factor


def trunk_learns(schedule: Schedule, state: State | None, whole_epochs: bool = False) -> bool:
    """Return whether a group of the trunk learns in the coming step; `state` None: in the first.

    With `whole_epochs`, at an epoch's start, a stage that begins within the epoch has not come: the length of the epoch
    may depend on the answer.
    """
    current = [
        [stage for stage in schedule.stages.get(group, ()) if _has_come_by(stage.start, state, whole_epochs)][-1:]
        for group in schedule.trunk
    ]
    return any(not stages or stages[0].factor is not None for stages in current)


def trunk_thaws_later(schedule: Schedule, state: State) -> bool:
    """Return whether a stage in which a group of the trunk learns has yet to come, at an epoch's start."""
    stages = [stage for group in schedule.trunk for stage in schedule.stages.get(group, ())]
    return any(stage.factor is not None and not _has_come_by(stage.start, state, True) for stage in stages)


def _has_come_by(start: Time, state: State | None, whole_epochs: bool) -> bool:
    if state is None:
        return start.value == 0
    end = state.max_duration
    if whole_epochs and start.unit == TimeUnit.DURATION and end is not None and end.unit == TimeUnit.EPOCH:
        return state.timestamp.epoch.value >= round(start.value * end.value, 9)
    return has_come(start, state)


def _current(stages: Sequence[Stage], state: State) -> Stage | None:
    passed = [stage for stage in stages if has_come(stage.start, state)]
    return passed[-1] if passed else None


def _warmed(stage: Stage, state: State) -> float:
    """Return the share of its rate that a stage has reached."""
    if stage.warmup is None:
        return 1.0
    return min(1.0, max(0.0, (position(stage.start.unit, state) - stage.start.value) / stage.warmup.value))


def position(unit: TimeUnit, state: State) -> float:
    """Return the time when a batch starts, with fractions of an epoch, as `has_come` counts it."""
    now, duration = state.timestamp, state.max_duration
    if unit == TimeUnit.DURATION:
        assert duration is not None
        return position(duration.unit, state) / duration.value
    if unit == TimeUnit.EPOCH:
        return now.epoch.value + now.batch_in_epoch.value / max(int(state.dataloader_len or 0), 1)
    return now.get(unit).value


@dataclass(frozen=True)
class RunStage:
    """Some steps of a run in which the same groups learn, at the same factors."""

    first: int
    steps: int
    factors: Mapping[str, float]  # of the groups that are not frozen


def run_stages(
    schedule: Schedule, groups: Sequence[str], num_steps: int, lengths: Mapping[TimeUnit, float]
) -> list[RunStage] | None:
    """Return the stages of a run in order, as far as is known at its start; `lengths` are steps per unit of time.

    Epochs count as equally long. None if a stage begins in a unit without a length.
    """
    lengths = {**lengths, TimeUnit.DURATION: num_steps}
    stages = {group: schedule.stages.get(group, ()) for group in groups}
    if any(stage.start.unit not in lengths for entries in stages.values() for stage in entries):
        return None
    starts = {
        group: [min(num_steps, int(round(stage.start.value * lengths[stage.start.unit], 9))) for stage in entries]
        for group, entries in stages.items()
    }
    edges = sorted({0, num_steps, *(start for entries in starts.values() for start in entries)})
    found = []
    for first, end in pairwise(edges):
        factors: dict[str, float] = {}
        for group, entries in stages.items():
            factor = 1.0
            for stage, start in zip(entries, starts[group], strict=True):
                if start <= first:
                    factor = stage.factor
            if factor is not None:
                factors[group] = factor
        found.append(RunStage(first, end - first, factors))
    return found


def has_come(start: Time, state: State) -> bool:
    """Return whether a time has passed when a batch starts.

    A share of the run is rounded down to whole batches, samples or tokens, as in Composer. But half an epoch is half of
    that epoch's own batches: epochs of packs differ in length, while Composer assumes a fixed one.
    """
    now, duration = state.timestamp, state.max_duration
    if start.unit != TimeUnit.DURATION:
        return now >= start
    assert duration is not None, "the Trainer sets max_duration before it starts"
    share = round(start.value * duration.value, 9)  # 0.29 * 100 is 28.999999999999996
    if duration.unit != TimeUnit.EPOCH:
        return now.get(duration.unit).value >= int(share)
    epoch, part = divmod(share, 1)
    batch = 0 if part == 0 else int(part * int(state.dataloader_len or 0))
    return (now.epoch.value, now.batch_in_epoch.value) >= (epoch, batch)
