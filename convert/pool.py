"""Runs the parts of a conversion in worker processes, with a progress bar over records."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from threading import Thread

from tqdm import tqdm

from convert.parts import Job, Part, make_part

_REFRESH = 0.2  # seconds between two looks at the counter of records

# Of a worker process: set once, when it starts.
_job: Job
_done: "Synchronized[int]"


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def iter_parts(job: Job, num_workers: int) -> Generator[Part, None, None]:
    """Makes all parts and yields them in order; those behind one that fails may be made, too.

    Args:
        job: The conversion.
        num_workers: Processes; 0 or 1: this one alone.

    Raises:
        ValueError: An entry cannot be read at all.
        OSError: The disk or the object store failed, or a worker died.
    """
    num_workers = min(num_workers, job.num_parts)
    if num_workers <= 1:
        with _progress_bar(job) as bar:
            for number in range(job.num_parts):
                yield make_part(job, number, bar.update)
        return
    # By fork, workers inherit the records, however many and whatever they hold: nothing is pickled or parsed twice.
    context = multiprocessing.get_context("fork")
    done: Synchronized[int] = context.Value("q", 0)
    executor = ProcessPoolExecutor(num_workers, context, _start_worker, (job, done))
    try:
        futures = [executor.submit(_make_part, number) for number in range(job.num_parts)]
        with _progress_bar(job) as bar:  # after the fork, as it may start a thread
            for future in futures:
                yield _watch(future, bar, done)
    except BrokenProcessPool as error:
        raise OSError(
            "a worker process was killed, perhaps for want of memory: run the same command again, with fewer "
            "--num-workers"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _progress_bar(job: Job) -> tqdm:
    hidden = None if job.restartable else True  # None: hidden unless on a terminal
    return tqdm(total=len(job.entries), unit=" records", file=sys.stderr, disable=hidden)


def _watch(future: "Future[Part]", bar: tqdm, done: "Synchronized[int]") -> Part:
    finished = False
    while not finished:
        finished = bool(wait([future], timeout=_REFRESH).done)
        bar.update(done.value - bar.n)
    return future.result()


def _start_worker(job: Job, done: "Synchronized[int]") -> None:
    global _job, _done
    _job, _done = job, done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the parent decides
    Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Else a worker whose parent was killed would wait for ever, and hold the conversion's lock."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make_part(number: int) -> Part:
    return make_part(_job, number, _advance)


def _advance(num_records: int) -> None:
    with _done.get_lock():
        _done.value += num_records
