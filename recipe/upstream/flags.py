"""Composer's uploader without the process that it starts for one flag.

Composer 0.32 (`RemoteUploader.__init__`): `Manager().Event()` starts a process per rank, which imports the main script,
and so torch, once more: 0.8 GB. After a SIGKILL of the rank it stays. Its flag says to other processes that an upload
has failed, which only Composer's own wait for a symlink asks. Delete once the flag needs no process.
"""

import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace


@contextmanager
def flags_without_process() -> Iterator[None]:
    """Make the events of this process's spawning managers its own meanwhile; such an event reaches no other process."""
    context = multiprocessing.get_context("spawn")
    context.Manager = lambda: SimpleNamespace(Event=threading.Event)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del context.Manager
