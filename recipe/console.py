"""Make the recipe's own log lines visible beside Composer's progress bar, and keep secrets out of all that is told."""

import logging
import os
import sys
import traceback
from types import TracebackType

from recipe.redact import redact_text


class RedactingFormatter(logging.Formatter):
    """Takes secrets out of whole lines, the tracebacks below them included."""

    def format(self, record: logging.LogRecord) -> str:
        """One record as text."""
        return redact_text(super().format(record))


def setup_logging() -> None:
    """Shows warnings of every library and, on rank 0, what the recipe reports; call once, first in an entry.

    Log lines, warnings and the traceback that ends a process hold no secrets.
    """
    rank = os.environ.get("RANK", "0")
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter(f"%(asctime)s rank {rank} %(name)s %(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("recipe").setLevel(logging.INFO if rank == "0" else logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = _print_traceback


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does, but without secrets."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print(redact_text("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
