"""Add to the algorithms of a rank what a soak needs: NaNs at the batches of the schedule, and its timetable."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from composer import Algorithm, Event, Logger, State
from composer.utils import dist

from tests.distributed.nan_run import hit_gradient, hit_loss, hit_loss_gradient, hit_weight
from tests.drills.soak_control import Control
from tests.drills.soak_schedule import PLACES, Nan, Schedule

HITS: Mapping[str, tuple[Event, Callable[[State], None]]] = {
    "loss": (Event.AFTER_LOSS, hit_loss),
    "loss_gradient": (Event.AFTER_LOSS, hit_loss_gradient),
    "gradient": (Event.AFTER_TRAIN_BATCH, hit_gradient),
    "weight": (Event.BATCH_START, hit_weight),
}
assert tuple(HITS) == PLACES


class Hits(Algorithm):
    """Waits for the timetable at each batch, and makes a value not finite at those of the schedule; the last algorithm.

    Composer calls the last algorithm first after the backward pass, so the guard sees what this one did.
    """

    def __init__(self, nans: Mapping[int, Nan], control: Control, is_undisturbed: bool):
        self.nans, self.control, self.is_undisturbed = nans, control, is_undisturbed

    def match(self, event: Event, state: State) -> bool:
        """Return whether a batch starts or this rank is hit."""
        return event is Event.BATCH_START or self._hit(event, state) is not None

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Wait; hit."""
        if event is Event.BATCH_START:
            batch = int(state.timestamp.batch)
            if dist.get_global_rank() == 0:
                self.control.note_batch(int(os.environ["SOAK_LAUNCH"]), batch)
            while self.control.allowed <= batch:
                time.sleep(0.02)
        hit = self._hit(event, state)
        if hit is not None:
            hit(state)

    def _hit(self, event: Event, state: State) -> Callable[[State], None] | None:
        nan = self.nans.get(int(state.timestamp.batch))
        if nan is None or nan.rank != dist.get_global_rank() or (self.is_undisturbed and nan.is_skipped):
            return None
        when, hit = HITS[nan.place]
        return hit if when is event else None


class LeaveOut(Algorithm):
    """Keeps the optimizer from the batches that the guard is to skip, without a NaN; the first algorithm."""

    def __init__(self, nans: Mapping[int, Nan]):
        self.nans = nans

    def match(self, event: Event, state: State) -> bool:
        """Return whether the backward pass of such a batch is over, when the guard has judged it."""
        nan = self.nans.get(int(state.timestamp.batch))
        return event is Event.AFTER_TRAIN_BATCH and nan is not None and nan.is_skipped

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Remove all gradients."""
        for parameter in state.model.parameters():
            parameter.grad = None


def with_disturbance(build: Callable[[Any], list[Algorithm]], control: Control) -> Callable[[Any], list[Algorithm]]:
    """Return the same function, whose list has these algorithms too."""

    def build_more(config: Any) -> list[Algorithm]:
        nans = {nan.batch: nan for nan in Schedule.from_json(os.environ["SOAK_SCHEDULE"]).nans}
        is_undisturbed = os.environ["SOAK_UNDISTURBED"] == "1"
        first = [LeaveOut(nans)] if is_undisturbed else []
        return [*first, *build(config), Hits(nans, control, is_undisturbed)]

    return build_more
