"""Counts over the records of a stream: made once on one rank, kept next to the index, broadcast to all ranks."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from composer.utils import dist
from streaming import Stream
from tqdm import tqdm

from recipe.records import RECORDS_FILE, DamagedRecordsError, read_records, shards_sha256, write_whole
from recipe.schema import Sample
from recipe.upstream.agreement import agree
from recipe.upstream.storage import INDEX_FILE, fetch_next_to_index

log = logging.getLogger(__name__)

Arrays = TypeVar("Arrays")
Counts = TypeVar("Counts")


def read_arrays(path: Path, kind: type[Arrays]) -> Arrays | None:
    """Read a dataclass of arrays; None if the file is missing or damaged. A damaged one is removed."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as arrays:
            return kind(**{entry.name: arrays[entry.name] for entry in fields(kind)})  # pyright: ignore[reportArgumentType]
    except Exception as error:  # zipfile, zlib and numpy each have their own
        log.warning("%s is damaged (%r): computing it again", path, error)
        path.unlink(missing_ok=True)
        return None


def write_arrays(path: Path, value: Any) -> None:
    """Write a dataclass of arrays as a whole; raise OSError if the folder cannot be written."""
    content = BytesIO()
    np.savez(content, **vars(value))
    write_whole(path, content.getvalue())


@dataclass(frozen=True)
class KeptCount(Generic[Counts]):
    """A count over the records of a stream, made once and kept next to its index.

    Attributes:
        form: A dataclass of arrays.
        name: First part of the file name; the fingerprints of the shards and of the count follow.
        fingerprint: Of all that the count depends on except the samples.
        what: Names the count in the log.
        remedy: What to do if a stream has no records.
        count: Computes it.
    """

    form: type[Counts]
    name: str
    fingerprint: str
    what: str
    remedy: str
    count: Callable[[Iterable[Sample]], Counts]

    def of(self, stream: Stream) -> Counts:
        """Return a stream's count, read or computed; raise ValueError if there are no records or one cannot be used."""
        index, folder = index_of(stream), Path(stream.local, stream.split)
        name = f"{self.name}-{shards_sha256(index)[:16]}-{self.fingerprint}.npz"
        path = fetch_next_to_index(stream, name)
        kept = None if path is None else read_arrays(path, self.form)
        if kept is not None:
            return kept
        start = time.monotonic()
        try:
            counts = self._count(stream)
        except DamagedRecordsError as error:
            if not stream.remote:
                raise
            log.warning("%s: fetching it again", error)
            (folder / RECORDS_FILE).unlink()
            counts = self._count(stream)
        num_samples = sum(shard["samples"] for shard in index["shards"])
        seconds = time.monotonic() - start
        log.info("%s: counted %d samples for %s in %.0f s", folder, num_samples, self.what, seconds)
        try:
            write_arrays(folder / name, counts)
        except OSError as error:
            log.warning("%s cannot be written (%s): the next run counts again", folder / name, error.strerror)
        return counts

    def _count(self, stream: Stream) -> Counts:
        records = fetch_next_to_index(stream, RECORDS_FILE)
        if records is None:
            raise ValueError(
                f"{Path(stream.local, stream.split)} has no {RECORDS_FILE} next to its {INDEX_FILE}, so its lengths "
                f"are unknown: convert the data set again, or {self.remedy}"
            )
        samples = read_records(records, index_of(stream))
        return self.count(tqdm(samples, unit=" samples", desc="count", disable=None))


def count_on_rank_0(streams: Sequence[Stream], kept: KeptCount[Counts]) -> list[Counts]:
    """Return the count of each stream, made by global rank 0 and broadcast."""
    found: list[Counts] = []
    error = None
    if dist.get_global_rank() == 0:
        try:
            found = [kept.of(stream) for stream in streams]
        except Exception as raised:  # raised by all ranks
            error = raised
    agree(error)
    shared = [found]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def index_of(stream: Stream) -> dict[str, Any]:
    """Return the parsed index.json of a stream."""
    return json.loads(Path(stream.local, stream.split, INDEX_FILE).read_text(encoding="utf-8"))
