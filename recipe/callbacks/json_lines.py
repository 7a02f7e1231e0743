"""Metrics as one JSON object a line, for scripts to read."""

import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist


class JsonLinesLogger(LoggerDestination):
    """Appends `{"step", "epoch", "time", "metrics"}` to a file at every logging call, on rank 0 only.

    A step may have several lines: Composer logs the loss, the rates and the clock in separate calls. A resumed run
    appends, so a step after the checkpoint stands twice; the last one counts. Numbers that JSON does not know are the
    texts "nan", "inf" and "-inf", which Python's `float` reads.

    Args:
        path: The file; folders are made.
    """

    def __init__(self, path: str = "metrics.jsonl"):
        self.path = Path(path)
        self._state: State | None = None
        self._file: TextIO | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Keeps the state, to know the epoch."""
        self._state = state

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Writes one line and flushes it."""
        if dist.get_global_rank() != 0 or not metrics:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
        line = {
            "step": step,
            "epoch": None if self._state is None else self._state.timestamp.epoch.value,
            "time": time.time(),
            "metrics": {name: _plain(value) for name, value in metrics.items()},
        }
        self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def close(self, state: State, logger: Logger) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return _plain(value[0]) if len(value) == 1 else [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, bool | int | None) else str(value)
