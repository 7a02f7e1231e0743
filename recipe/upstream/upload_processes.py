"""Processes that upload, of which one may be killed.

Python 3.11 to 3.13 (`concurrent.futures.ProcessPoolExecutor`): a killed process breaks its pool for good. All that was
submitted fails, nothing more is taken, and the pool then waits indefinitely for its other processes if these ignore the
SIGTERM that it sends. A process whose parent was killed waits for work indefinitely. Composer's uploader has one such
pool per rank, so after one kill no checkpoint reaches the store. Delete once Python replaces a killed process, and ends
those without a parent.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import connection, get_context, parent_process
from typing import Any

log = logging.getLogger(__name__)

MOST_TIMES = 3  # that one call is begun, so that one which kills its process does not do so indefinitely


class UploadProcesses(Executor):
    """Run calls in `num_processes` processes and repeat a call whose process was killed.

    They ignore SIGTERM, as a job may receive it before its last checkpoint is uploaded, and end with their parent: an
    upload that ends later could replace a file of the run that has resumed.
    """

    def __init__(self, num_processes: int):
        # A pool for each, so that a broken one has no other process to wait for.
        self._pools = [_start() for _ in range(num_processes)]
        self._num_open = [0] * num_processes
        self._lock = threading.Lock()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Begin a call in the process that has least to do."""
        promised = Future[Any]()
        self._begin(promised, partial(fn, *args, **kwargs), 1)
        return promised

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; `wait` for those that were submitted."""
        for pool in self._pools:
            pool.shutdown(wait, cancel_futures=cancel_futures)

    def _begin(self, promised: "Future[Any]", call: Callable[[], Any], times: int) -> None:
        with self._lock:
            place = min(range(len(self._pools)), key=self._num_open.__getitem__)
            try:
                found = self._pools[place].submit(call)
            except BrokenProcessPool:
                self._pools[place] = _start()
                found = self._pools[place].submit(call)
            self._num_open[place] += 1
        found.add_done_callback(partial(self._end, promised, call, times, place))

    def _end(
        self, promised: "Future[Any]", call: Callable[[], Any], times: int, place: int, found: "Future[Any]"
    ) -> None:
        with self._lock:
            self._num_open[place] -= 1
        error = found.exception()
        if isinstance(error, BrokenProcessPool) and times < MOST_TIMES:
            log.warning("a process that uploads was killed: the upload begins again")
            try:
                self._begin(promised, call, times + 1)
                return
            except RuntimeError as ended:  # this process ends, or `shutdown` was called
                error = ended
        if error is None:
            promised.set_result(found.result())
        else:
            promised.set_exception(error)


def _start() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), _set_up)


def _set_up() -> None:
    """Prepare a new process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
