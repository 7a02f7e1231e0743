"""What every logger of a run promises: it may fail, the run may not, and no secret passes."""

import logging
import time
from collections.abc import Callable
from typing import Any

from composer.core import Event, State
from composer.loggers import Logger, LoggerDestination

from recipe.redact import redact, redact_text

log = logging.getLogger(__name__)

REST = 60.0  # seconds without a call after one that failed, so that a full disk or a dead process costs no time


class GuardedLogger(LoggerDestination):
    """Stands before a logger's class in a list of bases: an error of that class is told once, and never raised.

    After an error the logger rests, then it is tried again; how many of its calls were lost is told at the end.
    Hyperparameters pass without their secrets.
    """

    _resting_until = 0.0
    _has_failed = False
    _num_lost = 0

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """What the logger does at an event of training."""
        self._attempt(super().run_event, event, state, logger)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Those of the run."""
        self._attempt(super().log_hyperparameters, redact(hyperparameters))

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Numbers of one step."""
        self._attempt(super().log_metrics, metrics, step)

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        """A table."""
        self._attempt(super().log_table, *args, **kwargs)

    def log_images(self, *args: Any, **kwargs: Any) -> None:
        """Pictures."""
        self._attempt(super().log_images, *args, **kwargs)

    def log_traces(self, traces: dict[str, Any]) -> None:
        """What algorithms did."""
        self._attempt(super().log_traces, traces)

    def upload_file(self, *args: Any, **kwargs: Any) -> None:
        """A file, for loggers that keep files."""
        self._attempt(super().upload_file, *args, **kwargs)

    def close(self, state: State, logger: Logger) -> None:
        """Ends the logger, and tells what was lost."""
        self._resting_until = 0.0
        self._attempt(super().close, state, logger)
        if self._num_lost:
            log.warning("%s lost %d calls of this run", type(self).__name__, self._num_lost)
            self._num_lost = 0

    def _attempt(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if time.monotonic() < self._resting_until:
            self._num_lost += 1
            return
        try:
            call(*args, **kwargs)
        except Exception as error:  # told, not raised: no log is worth the run
            self._num_lost += 1
            self._resting_until = time.monotonic() + REST
            if not self._has_failed:
                self._has_failed = True
                reason = redact_text(f"{type(error).__name__}: {error}")
                name = type(self).__name__
                log.warning("%s failed and is tried again every %.0f s; the run goes on: %s", name, REST, reason)
