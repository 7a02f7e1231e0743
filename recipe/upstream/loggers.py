"""A logger that cannot end a run: it pauses after a failure.

Composer 0.32 (`composer/core/engine.py`) lets an exception of a logger end the run. Delete this once it isolates them.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from composer.core import Event, State
from composer.loggers import Logger, LoggerDestination

from recipe.redact import redact, redact_text

log = logging.getLogger(__name__)

REST = 60.0  # seconds without calls after a failed one, so that a full disk or dead process costs no time


class GuardedLogger(LoggerDestination):
    """Put before a logger's class in the list of bases, logs its first error and raises none.

    After an error it drops calls for `REST` seconds, then tries again. At the end it logs how many calls were lost.
    Removes secrets from hyperparameters.
    """

    _resting_until = 0.0
    _has_failed = False
    _num_lost = 0

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Run the logger's part of an event."""
        self._attempt(super().run_event, event, state, logger)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Log the run's configuration without its secrets."""
        self._attempt(super().log_hyperparameters, redact(hyperparameters))

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log numbers of one step."""
        self._attempt(super().log_metrics, metrics, step)

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        """Log a table."""
        self._attempt(super().log_table, *args, **kwargs)

    def log_images(self, *args: Any, **kwargs: Any) -> None:
        """Log images."""
        self._attempt(super().log_images, *args, **kwargs)

    def log_traces(self, traces: dict[str, Any]) -> None:
        """Log what algorithms did."""
        self._attempt(super().log_traces, traces)

    def upload_file(self, *args: Any, **kwargs: Any) -> None:
        """Upload a file."""
        self._attempt(super().upload_file, *args, **kwargs)

    def close(self, state: State, logger: Logger) -> None:
        """Close the logger and report lost calls."""
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
        except Exception as error:  # logged, not raised: no log is worth the run
            self._num_lost += 1
            self._resting_until = time.monotonic() + REST
            if not self._has_failed:
                self._has_failed = True
                name = type(self).__name__
                log.warning("%s failed, retrying every %.0f s; training continues: %s", name, REST, describe(error))


def describe(error: Exception) -> str:
    """Return an error's kind and text, without secrets."""
    return redact_text(f"{type(error).__name__}: {error}")
