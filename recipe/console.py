"""The console: which log lines and warnings it shows, and that none of them holds a secret."""

import logging
import os
import re
import sys
import traceback
import warnings
from types import TracebackType

from recipe.redact import redact_text
from recipe.upstream.compiler import import_bitsandbytes_without_compiler

# Warnings of other libraries in a normal run, which no user can act on: the beginning of each, and why it is hidden.
HIDDEN_WARNINGS = {
    "`torch.utils._pytree._register_pytree_node`": "torch 2.7 calls its own deprecated function at import",
    "The warmup duration is 0": "Composer 0.32 at every start; a warm-up is not required",
    "No optimizer was specified": "Composer 0.32 in an evaluation, which has none",
    "Specifying the ProgressBarLogger": "Composer 0.32: ours replaces its own",
    "The memory monitor only works on CUDA": "the starter yamls name it, and run on a CPU too",
    "OOMObserver only works on CUDA": "as above",
    "The ``compute`` method of metric": "torchmetrics: entries of one evaluation pass their updates on",
    "FSDP2 Config/APIs are experimental": "Composer 0.32 at every start with FSDP2",
    "'mode' parameter is deprecated": "wandb 0.18 with Pillow 11.3 and later",
}


class RedactingFormatter(logging.Formatter):
    """Removes secrets from whole lines, the tracebacks below them included."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one record as text."""
        return redact_text(super().format(record))


def setup_logging() -> None:
    """Show warnings of every library and, on rank 0, what the recipe reports.

    To be called first in an entry, before other libraries are imported. Log lines, warnings and the traceback that ends
    a process hold no secrets.
    """
    rank = os.environ.get("RANK", "0")
    handler = logging.StreamHandler()
    who = "" if rank == "0" else f"rank {rank} "
    handler.setFormatter(RedactingFormatter(f"%(asctime)s {who}%(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("recipe").setLevel(logging.INFO if rank == "0" else logging.WARNING)
    logging.captureWarnings(True)
    import_bitsandbytes_without_compiler()
    # At import on a CPU with avx512_bf16 it names a kernel on the hub, which `recipe.models.nf4` does not use.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    for beginning in HIDDEN_WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(beginning))
    sys.excepthook = _print_traceback


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback as Python does, but without secrets."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print(redact_text("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
