"""Counts over the records of a stream: made once, by all cores, and kept next to its index."""

import logging
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from recipe.config import ConfigError
from recipe.data.mapped import Arrays, map_arrays, write_mapped
from recipe.records import (
    BLOCK,
    INDEX_FILE,
    RECORDS_FILE,
    DamagedRecordsError,
    read_records,
    shards_sha256,
    usable_cores,
)
from recipe.upstream.checked_stream import CheckedStream

log = logging.getLogger(__name__)

Counted = TypeVar("Counted")

_MOST_PROCESSES = 32  # each reads the whole file; more hardly gain, and a container may have fewer cores than it sees
LEAST_DIVIDED = 16 * BLOCK  # records; fewer are counted before other processes have begun


class MissingRecordsError(ConfigError):
    """A data set has no records next to its index."""


@dataclass(frozen=True)
class KeptCount:
    """A count over the records of a stream, made once and kept next to its index."""

    name: str  # first part of the file name; the fingerprints of the shards and of the count follow
    fingerprint: str  # of all that the count depends on except the samples
    what: str  # names the count in the log
    remedy: str  # what to do if a stream has no records
    count: Callable[[Iterable[Any]], Arrays]  # of what `read` yields
    read: Callable[..., Iterator[Any]] = read_records
    # Joins the counts of consecutive records, which several processes then make; None: one makes the whole count.
    join: Callable[[Sequence[Arrays]], Arrays] | None = None

    def of(self, stream: CheckedStream) -> Arrays:
        """Return a stream's count, read or computed; raise ValueError if there are no records or one cannot be used."""
        index = stream.read_index()
        name = f"{self.name}-{shards_sha256(index)[:16]}-{self.fingerprint}.npz"
        # Nobody asks the store if the records are at hand: it may be out of reach.
        is_counted_here = (stream.folder / RECORDS_FILE).is_file()
        path = stream.folder / name if is_counted_here else stream.fetch_next_to_index(name)
        kept = None if path is None else map_arrays(path)
        if kept is not None:
            return kept
        start = time.monotonic()
        try:
            counts = self._count(stream, index)
        except DamagedRecordsError as error:
            if stream.source is None:
                raise
            log.warning("%s: fetching it again", error)
            (stream.folder / RECORDS_FILE).unlink()
            counts = self._count(stream, index)
        num_samples = sum(shard["samples"] for shard in index["shards"])
        seconds = time.monotonic() - start
        log.info("%s: counted %d samples for %s in %.0f s", stream.folder, num_samples, self.what, seconds)
        path = stream.folder / name
        try:
            write_mapped(path, counts)
        except OSError as error:
            log.warning("%s cannot be written (%s): the next run counts again", path, error.strerror)
        return counts

    def _count(self, stream: CheckedStream, index: Mapping[str, Any]) -> Arrays:
        records = stream.fetch_next_to_index(RECORDS_FILE)
        if records is None:
            raise MissingRecordsError(
                f"{stream.folder} has no {RECORDS_FILE} next to its {INDEX_FILE}, so its lengths are unknown: "
                f"convert the data set again, or {self.remedy}"
            )
        num_samples = sum(shard["samples"] for shard in index["shards"])
        if num_samples == 0:
            raise ValueError(f"{stream.folder} has no samples: convert a data set that has some")
        num_processes = min(usable_cores(), num_samples // BLOCK, _MOST_PROCESSES)
        progress = partial(tqdm, total=num_samples, unit=" samples", desc="count", disable=None)
        if self.join is None or num_samples < LEAST_DIVIDED or num_processes < 2 or sys.platform != "linux":
            return self.count(progress(self.read(records, index)))
        found: list[Arrays] = []
        loader = DataLoader(
            _Blocks(self, records, index),
            batch_size=None,
            num_workers=num_processes,
            multiprocessing_context="fork",  # the count need not be picklable
            collate_fn=lambda block: block,
            generator=torch.Generator(),  # else it would draw from the run's own
        )
        with progress() as bar:
            for block in loader:
                if isinstance(block, Exception):
                    raise block
                found.append(block)
                bar.update(min(BLOCK, num_samples - bar.n))
        if len(found) != -(-num_samples // BLOCK):
            raise RuntimeError(f"{records}: a process counted and its count did not come: start again")
        return self.join(found)


class _Blocks(IterableDataset[Arrays | Exception]):
    """The counts of blocks of records, which the processes of a DataLoader make in turn."""

    def __init__(self, kept: KeptCount, records: Path, index: Mapping[str, Any]):
        self._kept, self._records, self._index = kept, records, index

    def __iter__(self) -> Iterator[Arrays | Exception]:
        """Yield the counts of this process's blocks, or what ends them."""
        worker = get_worker_info()
        assert worker is not None
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads have not come along
        records = self._kept.read(self._records, self._index, (worker.id, worker.num_workers))
        try:
            while block := list(islice(records, BLOCK)):
                yield self._kept.count(block)
        except Exception as error:  # a DataLoader would raise one with another text
            yield _sendable(error)


def _sendable(error: Exception) -> Exception:
    """Return an error that another process can raise, with where it was raised unless it speaks of the data."""
    try:
        again = pickle.loads(pickle.dumps(error))
    except Exception:  # its own arguments decide what fails
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        again = kind(f"{type(error).__name__}: {error}")
    if not isinstance(error, ValueError):
        again.add_note("".join(traceback.format_exception(error)))
    return again


def concatenated(parts: Sequence[Arrays]) -> Arrays:
    """Join arrays with an entry per record, or several."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def none_if_unknown(count: Callable[[], Counted]) -> Counted | None:
    """Return a count, None if it raises ValueError: what only informs needs no records."""
    try:
        return count()
    except ValueError:
        return None
