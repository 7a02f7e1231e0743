"""Stop a run by an evaluation's scores, and keep it stopped when it is started again."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from composer import Callback
from composer.callbacks import EarlyStopper, ThresholdStopper
from composer.core import State, TimeUnit
from composer.loggers import Logger

from recipe.metrics.gather import UNDEFINED

log = logging.getLogger(__name__)


class Stopping(Callback):
    """Put before one of Composer's stoppers in the list of bases, judges evaluations and logs why it stops the run.

    Composer 0.32 saves nothing of its stoppers: a stopped run that is started again would continue. Undefined scores do
    not count. Loss and metrics of training batches are not judged.
    """

    name: str  # in a yaml
    monitor: str
    reason: str | None = None  # why it stopped the run

    def eval_end(self, state: State, logger: Logger) -> None:
        """Wait for the end of all evaluations."""

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Judge the evaluation."""
        self.judge(state, {name: float(value) for name, value in state.eval_metric_values.items()})

    def judge(self, state: State, scores: Mapping[str, float]) -> None:
        """Stop the run if the scores ask for it."""
        if self.monitor not in scores:
            raise ValueError(
                f"callbacks.{self.name}.monitor {self.monitor} is measured by no evaluation: choose one of "
                f"{', '.join(scores)}"
            )
        if scores[self.monitor] != UNDEFINED:
            self.note(state, scores[self.monitor])
        self.stop_if_due(state)

    def after_load(self, state: State, logger: Logger) -> None:
        """Keep a stopped run stopped, by the configuration of now."""
        self.stop_if_due(state)

    def stop_if_due(self, state: State) -> None:
        """Stop the run and log why, unless it has ended anyway."""
        reason = self.why(state)
        has_ended = state.max_duration is not None and state.timestamp >= state.max_duration
        if reason is None or reason == self.reason or has_ended:
            return
        self.reason = reason
        log.warning("%s stopped the run at batch %d: %s", self.name, int(state.timestamp.batch), reason)
        state.stop_training()

    def note(self, state: State, value: float) -> None:
        """Remember a score."""
        raise NotImplementedError

    def why(self, state: State) -> str | None:
        """Return why the run ends here; None if it does not."""
        raise NotImplementedError


class StayingEarlyStopper(Stopping, EarlyStopper):
    """Composer's, by evaluations only, with its best score in the checkpoint."""

    name = "early_stopper"
    best: float | None
    best_occurred: Any

    def note(self, state: State, value: float) -> None:
        """Keep the best score and when it occurred."""
        best = self.best
        if best is None or (self.comp_func(*_tensors(value, best)) and abs(value - best) > self.min_delta):
            now = state.timestamp
            self.best, self.best_occurred = value, {"batch": int(now.batch), "epoch": int(now.epoch)}

    def why(self, state: State) -> str | None:
        """Return why if the best score is older than `patience`."""
        unit = "epoch" if self.patience.unit == TimeUnit.EPOCH else "batch"
        if self.best_occurred is None:
            return None
        since = self.best_occurred[unit]
        if int(getattr(state.timestamp, unit)) - since <= int(self.patience.value):
            return None
        return f"{self.monitor} has not improved on {self.best:g} since {unit} {since} (patience {self.patience})"

    def state_dict(self) -> dict[str, Any]:
        """Return the best score of this metric."""
        return {"monitor": self.monitor, "best": self.best, "best_occurred": self.best_occurred}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it; that of another metric does not count."""
        if state.get("monitor") == self.monitor:
            self.best, self.best_occurred = state["best"], state["best_occurred"]


class StayingThresholdStopper(Stopping, ThresholdStopper):
    """Composer's, by evaluations only, with the last score in the checkpoint."""

    name = "threshold_stopper"
    last: float | None = None

    def note(self, state: State, value: float) -> None:
        """Keep the score."""
        self.last = value

    def why(self, state: State) -> str | None:
        """Return why if the last score is beyond the threshold."""
        if self.last is None or not self.comp_func(*_tensors(self.last, self.threshold)):
            return None
        return f"{self.monitor} is {self.last:g} (threshold {self.threshold:g})"

    def state_dict(self) -> dict[str, Any]:
        """Return the last score of this metric."""
        return {"monitor": self.monitor, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it; that of another metric does not count."""
        if state.get("monitor") == self.monitor:
            self.last = state["last"]


def _tensors(*values: float) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(value, dtype=torch.float64) for value in values)
