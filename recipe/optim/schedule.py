"""Learning rates over time: a group's base curve times the factor of the stage that it is in, or frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from composer import State, Time, TimeUnit
from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearWithWarmupScheduler,
)

from recipe.config import GROUPS, ConfigError, CurveConfig, RecipeConfig, nearest

FROZEN = "frozen"


@dataclass(frozen=True)
class Stage:
    """From `start` on, a factor on a group's learning rate; None: frozen."""

    start: Time
    factor: float | None


@dataclass(frozen=True)
class Schedule:
    """Of every group: its base curve; and its stages, where it has any."""

    curves: Mapping[str, ComposerScheduler]
    stages: Mapping[str, Sequence[Stage]]

    @property
    def freezes(self) -> bool:
        """Whether any group is ever frozen."""
        return any(stage.factor is None for stages in self.stages.values() for stage in stages)


def build_schedule(config: RecipeConfig) -> Schedule:
    """The schedule that the sections `scheduler` and `staged_freezing` describe.

    Raises:
        ConfigError: Naming the key and the remedy.
    """
    curves = {group: build_curve(config.scheduler.groups.get(group, config.scheduler)) for group in GROUPS}
    return Schedule(curves, parse_stages(config))


def build_curve(config: CurveConfig) -> ComposerScheduler:
    """Composer's scheduler of that name: a function of the training state."""
    if config.name == "cosine":
        return CosineAnnealingWithWarmupScheduler(t_warmup=config.t_warmup, alpha_f=config.alpha_f)
    if config.name == "linear":
        return LinearWithWarmupScheduler(t_warmup=config.t_warmup, alpha_f=config.alpha_f)
    return ConstantWithWarmupScheduler(t_warmup=config.t_warmup)


def lr_factor(schedule: Schedule, group: str, state: State) -> float:
    """What a group's learning rate is multiplied with in the coming step; 0 while it is frozen."""
    stage = stage_factor(schedule.stages.get(group, ()), state)
    return 0.0 if stage is None else schedule.curves[group](state) * stage


def stage_factor(stages: Sequence[Stage], state: State) -> float | None:
    """The factor of the last stage in the list whose time has come, 1 before the first; None: frozen."""
    factor: float | None = 1.0
    for stage in stages:
        if has_come(stage.start, state):
            factor = stage.factor
    return factor


def has_come(start: Time, state: State) -> bool:
    """Whether a time is reached when a batch starts.

    A share of the run is rounded down to whole batches, samples or tokens, as Composer does. But Composer counts an
    epoch as so many batches, and epochs of packs differ in length: here an epoch begins when it begins, and half an
    epoch is half of its own batches.
    """
    now, duration = state.timestamp, state.max_duration
    if start.unit != TimeUnit.DURATION:
        return now >= start
    assert duration is not None, "the Trainer knows how long it trains before it starts"
    share = round(start.value * duration.value, 9)  # 0.29 * 100 is 28.999999999999996
    if duration.unit != TimeUnit.EPOCH:
        return now.get(duration.unit).value >= int(share)
    epoch, part = divmod(share, 1)
    batch = 0 if part == 0 else int(part * int(state.dataloader_len or 0))
    return (now.epoch.value, now.batch_in_epoch.value) >= (epoch, batch)


def parse_stages(config: RecipeConfig) -> dict[str, list[Stage]]:
    """The stages of the section `staged_freezing`, `detection_freeze_epochs` written out.

    Raises:
        ConfigError: Naming the key and the remedy.
    """
    section, where = config.staged_freezing, "staged_freezing.groups"
    groups = {group: _parse_list(f"{where}.{group}", entries) for group, entries in section.groups.items()}
    if section.detection_freeze_epochs is not None:
        for group in ("adapter", "detection"):
            if group in groups:
                raise ConfigError(
                    f"staged_freezing.detection_freeze_epochs and {where}.{group} both say when to freeze {group}: "
                    "give one of them"
                )
            if section.detection_freeze_epochs and getattr(config.optimizer, f"lr_{group}"):
                thaw = Stage(Time(section.detection_freeze_epochs, TimeUnit.EPOCH), 1.0)
                groups[group] = [Stage(Time(0, TimeUnit.EPOCH), None), thaw]
    for group, stages in groups.items():
        _check_group(group, stages, config)
    trained = [group for group in GROUPS if getattr(config.optimizer, f"lr_{group}")]
    if trained and all(_first_factor(groups.get(group, [])) is None for group in trained):
        raise ConfigError(f"{where} freezes {', '.join(trained)} at the start, so nothing would train: leave one out")
    return groups


def _parse_list(where: str, entries: Any) -> list[Stage]:
    group = where.rpartition(".")[2]
    if group not in GROUPS:
        raise ConfigError(f"unknown key {where}: {nearest(group, GROUPS)}")
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise ConfigError(
            f"{where} is {entries!r}: give a list such as [{{from: 0ep, lr: frozen}}, {{from: 1ep, lr: 1}}]"
        )
    return [_parse_entry(f"{where}[{index}]", entry) for index, entry in enumerate(entries)]


def _parse_entry(where: str, entry: Any) -> Stage:
    if not isinstance(entry, Mapping) or set(entry) != {"from", "lr"}:
        raise ConfigError(f"{where} is {entry!r}: give `from` and `lr`, such as {{from: 1ep, lr: 0.1}}")
    return Stage(_parse_time(f"{where}.from", entry["from"]), _parse_factor(f"{where}.lr", entry["lr"]))


def _parse_time(where: str, value: Any) -> Time:
    try:
        time = Time.from_timestring(value)
        if time.value >= 0 and time.unit not in (TimeUnit.SECOND, TimeUnit.ITERATION):
            return time
    except (ValueError, TypeError):
        pass
    raise ConfigError(
        f"{where} is {value!r}: it must be a time such as 2ep, 500ba, 1000sp (packs), 20000tok or 0.75dur; "
        "part of an epoch is a share of the run (dur)"
    )


def _parse_factor(where: str, value: Any) -> float | None:
    if value == FROZEN:
        return None
    # Written so that NaN fails too.
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < inf:
        return float(value)
    raise ConfigError(f"{where} is {value!r}: it must be {FROZEN}, or a factor on the learning rate of 0 or more")


def _check_group(group: str, stages: Sequence[Stage], config: RecipeConfig) -> None:
    where = f"staged_freezing.groups.{group}"
    if not getattr(config.optimizer, f"lr_{group}"):
        raise ConfigError(f"{where} is given, but optimizer.lr_{group} is 0, which freezes it throughout: drop one")
    duration = config.trainer.get("max_duration")
    reached = [stage for stage in stages if not _is_never(stage.start, duration)]
    throughout = _first_factor(stages) is None and all(stage.factor is None for stage in reached)
    if throughout:
        raise ConfigError(f"{where} freezes it throughout: set optimizer.lr_{group}=0, which needs no optimizer state")


def _first_factor(stages: Sequence[Stage]) -> float | None:
    """Of the first batch."""
    factors = [stage.factor for stage in stages if stage.start.value == 0]
    return factors[-1] if factors else 1.0


def _is_never(start: Time, duration: Any) -> bool:
    if start.unit == TimeUnit.DURATION:
        return start.value >= 1
    if isinstance(duration, int):
        duration = f"{duration}ep"
    end = Time.from_timestring(duration) if isinstance(duration, str) else None
    return end is not None and end.unit == start.unit and start >= end
