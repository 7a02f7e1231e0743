"""A StreamingDataset that raises if a shard cannot be read.

Faults of Streaming 0.13 (`streaming/base/dataset.py`):

- `on_exception` raises in a future's callback, which swallows the error: the epoch ends early in silence.
- `prepare_shard` leaves a failed shard in the state "preparing": sibling workers wait for it indefinitely.
- `_ready_thread` waits indefinitely for a shard that was evicted before it was read (`cache_limit`).
- `state_dict` at an epoch's end describes the start of the finished epoch, which a resume then repeats.
- Runs that start together may take the same number of shared memory (`streaming/base/shared/prefix.py`).

Delete a part once Streaming fixes its fault; `test_upstream_ends_early_in_silence` and
`test_a_finished_epoch_is_not_replayed` then fail.
"""

import os
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
from composer.utils import dist
from filelock import BaseFileLock, FileLock, Timeout
from streaming import StreamingDataset
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.shared import SharedArray, _get_path

from recipe.records import INDEX_FILE
from recipe.schema import Sample
from recipe.upstream.agreement import agree
from recipe.upstream.checked_stream import DOWNLOAD_RETRY, DOWNLOAD_TIMEOUT, CheckedStream
from recipe.upstream.shared_memory import FAILURE_SEGMENT

# pyright: reportPrivateUsage=false
FAILED = _ShardState.INVALID  # a state that Streaming never uses
_WATCH_INTERVAL = 0.25  # seconds
_LONGEST_REASON = 4096  # bytes
_MOST_NAMED = 5  # shards
_SECONDS_FOR_ANOTHER_RUN = 60.0  # to open its shards


class CheckedDataset(StreamingDataset):
    """A StreamingDataset that never ends early in silence, never hangs its siblings, never reads unchecked bytes.

    A shard that cannot be read ends the iteration of every worker of the node with an error that names it. The data
    set is unusable afterwards.
    """

    def __init__(self, *, streams: Sequence[CheckedStream], cache_limit: int | str | None = None, **keywords: Any):
        """Open the shards of streams from `open_streams`; keywords are those of `streaming.StreamingDataset`."""
        for stream in streams:
            if cache_limit and stream.source is None:
                raise ValueError(
                    f"cache_limit is {cache_limit}, but {stream.folder} has no `remote` to fetch its shards from "
                    "again: they would be deleted for good. Remove cache_limit"
                )
            stream.checks_all_at_start = bool(cache_limit)
        self._num_expected = 0
        self._thread_error: BaseException | None = None
        with _only_run_that_starts():
            bounds = {"download_retry": DOWNLOAD_RETRY, "download_timeout": DOWNLOAD_TIMEOUT}
            super().__init__(streams=streams, cache_limit=cache_limit, **{**bounds, **keywords})
        # Why a shard failed, for all ranks and workers of the node.
        self._reason = SharedArray(_LONGEST_REASON, np.uint8, _get_path(self._shm_prefix_int, FAILURE_SEGMENT))
        if dist.get_local_rank() == 0:
            self._reason[:] = 0

    def _each_sample_id(self, it: _Iterator) -> Iterator[int]:
        self._num_expected = int((it.sample_ids != -1).sum())  # -1: skipped
        return super()._each_sample_id(it)

    def __iter__(self) -> Iterator[Any]:
        """Yield this worker's rows; raise RuntimeError with shards and counts if a shard or a row is missing."""
        self._raise_failure()
        num_found, self._num_expected = 0, 0
        expected: int | None = None
        iterator: _Iterator | None = None
        try:
            for row in super().__iter__():
                # Of this iteration: a later one replaces both.
                expected, iterator = self._num_expected, self._iterator
                num_found += 1
                yield row
        except Exception as error:
            self._raise_failure(error, num_found, expected)
            raise
        finally:
            if iterator is not None:
                iterator.non_blocking_exit()
        expected = self._num_expected if expected is None else expected
        if num_found != expected:
            self._raise_failure(None, num_found, expected)
            raise RuntimeError(
                f"the data ended after {num_found} of {expected} samples of this worker: another iteration of the "
                "same data set has started. Finish one first"
            )

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """Return the row at a position, its shard fetched and checked first."""
        shard_id, _ = self.spanner[sample_id]
        if self._shard_states[shard_id] != _ShardState.LOCAL:
            self.prepare_shard(shard_id)
        return super().get_item(sample_id, retry)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch and check a shard; raise RuntimeError if it cannot be read."""
        if self._shard_states[shard_id] != FAILED:
            try:
                super().prepare_shard(shard_id, blocking)
            except BaseException as error:
                self._note_failure(shard_id, error)
                if not isinstance(error, Exception):
                    raise
        if self._shard_states[shard_id] == FAILED:
            self._raise_failure()

    def _prepare_thread(self, it: _Iterator) -> None:
        try:
            super()._prepare_thread(it)
        except BaseException:
            it.on_exit()  # else the end of the iteration waits for this thread indefinitely
            raise

    def _ready_thread(self, it: _Iterator) -> None:
        # It waits for the shards that siblings fetch; only the event makes it stop.
        done = threading.Event()
        threading.Thread(target=self._watch, args=(it, done), name="watch shards", daemon=True).start()
        try:
            super()._ready_thread(it)
        except BaseException:
            it.on_exit()
            raise
        finally:
            done.set()

    def on_exception(self, future: "Future[None]") -> None:
        """Keep the error of a background thread for the iteration to raise."""
        error = future.exception()
        if error is not None:
            self._thread_error = error
            self._event.set()

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return Streaming's state, fixed: at an epoch's end it is the next epoch's start, not the finished one's."""
        state = super().state_dict(num_samples, from_beginning)
        if num_samples == 0 and from_beginning:
            state["epoch"] = max(state["epoch"], self.next_epoch)
        return state

    def _note_failure(self, shard_id: int, error: BaseException) -> None:
        """Report a failed shard to all workers of the node, which would otherwise wait for it or for its lock."""
        if self._shard_states[shard_id] != FAILED:
            text = f"{type(error).__name__}: {error}".encode()[: _LONGEST_REASON - 1]
            if not self._reason[0]:
                self._reason[: len(text)] = np.frombuffer(text, dtype=np.uint8)
            self._shard_states[shard_id] = FAILED
        # Each call has its own lock object, which only its frame still holds.
        for frame, _ in traceback.walk_tb(error.__traceback__):
            lock = frame.f_locals.get("lock")
            if isinstance(lock, BaseFileLock):
                lock.release(force=True)

    def _watch(self, it: _Iterator, done: threading.Event) -> None:
        """End this worker's threads once a shard has failed in any worker of the node.

        Also fetches again a shard that was evicted before it was read, as when `cache_limit` is too small for
        `predownload`; the thread would wait for it indefinitely.
        """
        while not done.wait(_WATCH_INTERVAL):
            if (self._shard_states.numpy() == FAILED).any():
                self._event.set()
                return
            sample = it.sample_ids[it.ready_index] if it.ready_index < it.total else -1
            if sample != -1:
                shard_id, _ = self.spanner[int(sample)]
                if self._shard_states[shard_id] == _ShardState.REMOTE:
                    with suppress(RuntimeError):  # a failed shard is seen above in the next round
                        self.prepare_shard(shard_id, blocking=False)

    def _raise_failure(self, cause: BaseException | None = None, found: int = 0, expected: int | None = None) -> None:
        """Raise the error of a failed shard or background thread, if any."""
        counts = "" if expected is None else f"the data ended after {found} of {expected} samples of this worker: "
        failed = np.flatnonzero(self._shard_states.numpy() == FAILED)
        if len(failed):
            shards = [self.shards[number] for number in failed[:_MOST_NAMED]]
            names = [os.path.join(shard.dirname, shard.split, shard.file_pairs[0][0].basename) for shard in shards]
            reason = bytes(self._reason.numpy()).rstrip(b"\0").decode(errors="replace")
            raise RuntimeError(f"{counts}cannot read {', '.join(names)}: {reason}") from cause
        if self._thread_error is not None:
            raise RuntimeError(f"{counts}a background thread failed: {self._thread_error}") from self._thread_error


@contextmanager
def _only_run_that_starts() -> Iterator[None]:
    """Let one run per machine open shards at a time: Streaming takes a number of shared memory without a lock.

    The wait is bounded: two runs over the same machines could each hold the lock that the other waits for.
    """
    lock = FileLock(os.path.join(gettempdir(), f"checked_dataset_{os.getuid()}.lock"))
    if dist.get_local_rank() == 0:
        with suppress(Timeout):
            lock.acquire(timeout=_SECONDS_FOR_ANOTHER_RUN)
    try:
        dist.barrier()
        yield
    finally:
        lock.release()


def open_streams(streams: Mapping[str, Mapping[str, Any]]) -> list[CheckedStream]:
    """Open named streams, each from `streaming.Stream` keywords, and fetch their indexes.

    All ranks must call it; the first rank of each node fetches, and all ranks raise its error.

    Raises:
        ValueError: There is none, or a folder has no converted data set, or a file of it is bad.
        RuntimeError: An index cannot be fetched.
    """
    opened: list[CheckedStream] = []
    error = None
    try:
        if not streams:
            raise ValueError("no stream is given: name at least one under `streams`")
        opened = [_open_stream(name, keywords) for name, keywords in streams.items()]
        if dist.get_local_rank() == 0:
            for stream in opened:
                stream.set_up_folder()
    except Exception as raised:  # raised by all ranks
        error = raised
    agree(error)
    return opened


def _open_stream(name: str, keywords: Mapping[str, Any]) -> CheckedStream:
    source = keywords.get("remote") or keywords.get("local")
    if not source:
        raise ValueError(f"stream {name!r} has neither `local` nor `remote`: give the folder that convert/ wrote")
    if not keywords.get("local"):
        raise ValueError(f"stream {name!r} has a `remote` but no `local`: set it to a folder for its shards")
    folder = Path(source, keywords.get("split") or "")
    if "://" not in source and not (folder / INDEX_FILE).is_file():
        state = f"holds no {INDEX_FILE}" if folder.is_dir() else "does not exist"
        raise ValueError(
            f"stream {name!r}: the folder {folder} {state}: convert a data set into it first, "
            "with `python -m convert.coco|voc|jsonl|shapes --out DIR --split SPLIT`"
        )
    stream = CheckedStream(**keywords)
    stream.key = name
    return stream


def read_mds(folder: Path, split: str | None = None) -> Iterator[Sample]:
    """Yield all samples of a converted data set, in stored order; raise ValueError if it is damaged or not one."""
    rows = CheckedDataset(streams=open_streams({"annotated": {"local": str(folder), "split": split}}), batch_size=1)
    for index in range(rows.num_samples):
        yield Sample.from_mds(rows[index])
