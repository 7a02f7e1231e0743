"""The loggers that write files, as a run needs that is killed and goes on."""

from pathlib import Path

from composer.core import State
from composer.loggers import FileLogger, Logger, TensorboardLogger

from recipe.loggers.guarded import GuardedLogger
from recipe.loggers.json_lines import JsonLinesLogger
from recipe.redact import redact_text


class GuardedJsonLinesLogger(GuardedLogger, JsonLinesLogger):
    """One JSON object a line; see `recipe/loggers/json_lines.py`."""


class GuardedTensorboardLogger(GuardedLogger, TensorboardLogger):
    """Composer's. A resumed run of the same name adds event files, of which TensorBoard shows each step's last value.

    After a write that failed it stays silent until the run is started again: its writer does not recover.
    """


class TextLogger(GuardedLogger, FileLogger):
    """Composer's text log of metrics and of all that is printed; a resumed run appends, where Composer's overwrites."""

    def init(self, state: State, logger: Logger) -> None:
        """Opens the file."""
        self._run_name = state.run_name
        path = Path(self.filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", buffering=self.buffer_size, encoding="utf-8")
        self._flush_queue()

    def write(self, prefix: str, s: str) -> None:
        """One text; also called at every `print`, which must not fail where the disk is full."""
        self._attempt(super().write, prefix, redact_text(s))
