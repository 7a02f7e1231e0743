"""Write metrics to files: JSON lines, TensorBoard, text."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from composer.core import State
from composer.loggers import FileLogger, Logger, LoggerDestination, TensorboardLogger
from composer.utils import dist

from recipe.records import write_whole
from recipe.redact import redact_text
from recipe.upstream.loggers import GuardedLogger

log = logging.getLogger(__name__)

REPLACED_SUFFIX = ".replaced"


class JsonLinesLogger(LoggerDestination):
    """Appends `{"step", "epoch", "time", "in_batch", "metrics"}` to a file at every logging call, on rank 0 only.

    The line of a table has `table` (its name), `columns` and `rows` too, and no metrics.

    A step may have several lines: Composer logs the loss, the rates and the clock in separate calls. `step` counts the
    batches that are done. With `in_batch` a line belongs to the next batch, otherwise to what follows the last one,
    such as an evaluation. Numbers that JSON lacks are the texts "nan", "inf" and "-inf", which Python's `float` reads.

    A run that resumes from a checkpoint repeats some batches. Their first lines move to `PATH.replaced`, so that the
    file holds every batch once.
    """

    def __init__(self, path: str = "metrics.jsonl"):
        self.path = Path(path)
        self._state: State | None = None
        self._file: TextIO | None = None
        self._begun: int | None = None  # the batch that began last

    def init(self, state: State, logger: Logger) -> None:
        """Keep the state, which knows the epoch."""
        self._state = state

    def fit_start(self, state: State, logger: Logger) -> None:
        """Set aside what will be logged again."""
        if dist.get_global_rank() == 0 and self.path.exists():
            self.close(state, logger)
            set_aside(self.path, int(state.timestamp.batch))

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Note that a batch begins."""
        self._begun = int(state.timestamp.batch)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write one line and flush it."""
        if metrics:
            self._write(step, {"metrics": {name: _plain(value) for name, value in metrics.items()}})

    def log_table(
        self, columns: list[str], rows: list[list[Any]], name: str = "Table", step: int | None = None
    ) -> None:
        """Write one line and flush it."""
        plain = [[_plain(cell) for cell in row] for row in rows]
        self._write(step, {"metrics": {}, "table": name, "columns": columns, "rows": plain})

    def _write(self, step: int | None, content: dict[str, Any]) -> None:
        if dist.get_global_rank() != 0:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
        timestamp = None if self._state is None else self._state.timestamp
        line = {
            "step": step,
            "epoch": None if timestamp is None else timestamp.epoch.value,
            "time": time.time(),
            "in_batch": timestamp is not None and self._begun == timestamp.batch.value,
            **content,
        }
        self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def close(self, state: State, logger: Logger) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def set_aside(path: Path, step: int) -> None:
    """Move the lines of `path` that a run resumed from `step` logs again to the end of `PATH.replaced`.

    Lines that are not JSON, such as one cut off by a full disk, move too.
    """
    kept, replaced = [], []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            (kept if _precedes(line, step) else replaced).append(line)
    if not replaced:
        return
    with path.with_name(path.name + REPLACED_SUFFIX).open("a", encoding="utf-8") as file:
        file.writelines(line.rstrip("\n") + "\n" for line in replaced)
    write_whole(path, "".join(kept).encode())
    log.info("%s: the %d lines after step %d are in %s%s", path, len(replaced), step, path.name, REPLACED_SUFFIX)


def _precedes(line: str, step: int) -> bool:
    try:
        entry = json.loads(line)
        return entry["step"] < step or (entry["step"] == step and not entry["in_batch"])
    except (ValueError, KeyError, TypeError):
        return False


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return _plain(value[0]) if len(value) == 1 else [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, bool | int | None) else str(value)


class GuardedJsonLinesLogger(GuardedLogger, JsonLinesLogger):
    """`JsonLinesLogger`, whose failures do not end the run."""


class GuardedTensorboardLogger(GuardedLogger, TensorboardLogger):
    """Composer's, in one folder: a run without a name has a new random one at each start.

    A resumed run adds event files; TensorBoard shows the last value of each step.

    After a failed write it logs nothing until the run is started again, as its writer does not recover.
    """

    folder_name: str | None = None  # of the run, below log_dir

    def init(self, state: State, logger: Logger) -> None:
        """Open the folder."""
        self.run_name = self.folder_name or state.run_name
        self.log_dir = self.log_dir or "tensorboard_logs"
        self._attempt(self._initialize_summary_writer)


class TextLogger(GuardedLogger, FileLogger):
    """Composer's text log of metrics and of all that is printed, but a resumed run appends instead of overwriting."""

    def init(self, state: State, logger: Logger) -> None:
        """Open the file."""
        self._run_name = state.run_name
        path = Path(self.filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", buffering=self.buffer_size, encoding="utf-8")
        self._flush_queue()

    def write(self, prefix: str, s: str) -> None:
        """Write a text; also called at every `print`, which must not fail if the disk is full."""
        self._attempt(super().write, prefix, redact_text(s))
