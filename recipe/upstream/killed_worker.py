"""A loader's worker that the system kills ends its rank soon, wherever the rank's main thread is.

torch 2.7 raises in the main thread, once that runs Python again. It never does in a collective, where it waits for a
rank whose workers wait for the killed one: Streaming's workers of a node wait for each other at the start of an epoch,
and for a shard that one of them fetches. All ranks would wait until `dist_timeout`. Delete once torch ends such a run.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.context import Process

log = logging.getLogger(__name__)

# Seconds for the main thread to raise and close its loggers. A launcher gives the other ranks 30 more.
PATIENCE = 15

_MEANT = (signal.SIGTERM, signal.SIGINT)  # torch's, a scheduler's, a terminal's
_REMEDIES = {
    signal.SIGKILL: "probably because memory ran out. Lower num_workers or prefetch_factor (train_loader.dataloader, "
    "eval_loader.dataloader), or image.max_pixels",
    signal.SIGBUS: "probably because shared memory (/dev/shm) is full. Enlarge it (docker: --shm-size), or lower "
    "num_workers or prefetch_factor (train_loader.dataloader, eval_loader.dataloader)",
}


def end_if_killed(workers: Sequence[Process]) -> None:
    """Watch a loader's workers: report one that a signal ends, and end this process if it does not end by itself."""
    if workers:
        threading.Thread(target=_watch, args=[list(workers)], daemon=True).start()


def explained(error: Exception, workers: Sequence[Process]) -> Exception:
    """Return an error that says which worker was killed and why, if one was; else the loader's own error."""
    with suppress(RuntimeError):  # torch's, of the same worker
        time.sleep(0.2)  # a process closes its pipes a moment before its status is known
    killed = _why_killed(workers)
    return error if killed is None else RuntimeError(killed)


def _watch(workers: list[Process]) -> None:
    while workers:
        ready = connection.wait([worker.sentinel for worker in workers])
        ended = [worker for worker in workers if worker.sentinel in ready]
        killed = _why_killed(ended, options=0)  # waits for the status
        if killed is not None:
            log.error("%s. The run ends", killed)
            signal.alarm(PATIENCE)  # ends the process also in a collective or at its exit, where no thread would
            return
        workers = [worker for worker in workers if worker not in ended]


def _why_killed(workers: Sequence[Process], options: int = os.WNOHANG) -> str | None:
    for worker in workers:
        number = _signal_of(worker, options)
        if number and number not in _MEANT:
            remedy = _REMEDIES.get(signal.Signals(number), "a fault in a library that it uses")
            return f"worker {worker.pid} of a loader was killed by {signal.Signals(number).name}, {remedy}"
    return None


def _signal_of(worker: Process, options: int) -> int:
    """Return the signal that ended it, else 0; leave it to torch to collect its status and to raise."""
    assert worker.pid is not None
    try:
        found = os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT | options)
    except ChildProcessError:  # collected already, by a thread that notes the exit code a moment later
        until = time.monotonic() + 1
        while worker.exitcode is None and time.monotonic() < until:
            time.sleep(0.01)
        return max(0, -(worker.exitcode or 0))
    return 0 if found is None or found.si_code == os.CLD_EXITED else found.si_status
