"""Counts over the records of a stream: made once by one rank, kept beside the index, told to all ranks."""

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
from recipe.upstream.storage import INDEX_FILE, fetch_beside_index

log = logging.getLogger(__name__)

Arrays = TypeVar("Arrays")


def read_arrays(path: Path, kind: type[Arrays]) -> Arrays | None:
    """The dataclass kept in a file; None where there is no file, or a damaged one, which is removed."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as arrays:
            return kind(**{entry.name: arrays[entry.name] for entry in fields(kind)})  # pyright: ignore[reportArgumentType]
    except Exception as error:  # zipfile, zlib and numpy each have their own
        log.warning("%s is damaged (%r): it is made anew", path, error)
        path.unlink(missing_ok=True)
        return None


def write_arrays(path: Path, value: Any) -> None:
    """Keeps a dataclass of arrays.

    Raises:
        OSError: It cannot be written.
    """
    content = BytesIO()
    np.savez(content, **vars(value))
    write_whole(path, content.getvalue())


Counts = TypeVar("Counts")


@dataclass(frozen=True)
class KeptCount(Generic[Counts]):
    """A count over the records of a stream that is made once and kept beside its index.

    Attributes:
        form: A dataclass of arrays.
        name: Of the file, with the two fingerprints after it: of the shards and the one below.
        fingerprint: Of all that the count depends on beside the samples.
        what: Is counted, for the log.
        remedy: For a stream without records.
        count: Counts.
    """

    form: type[Counts]
    name: str
    fingerprint: str
    what: str
    remedy: str
    count: Callable[[Iterable[Sample]], Counts]

    def of(self, stream: Stream) -> Counts:
        """Of a stream: read where kept, else counted and kept.

        Raises:
            ValueError: The stream has no records beside its index, or a sample cannot be used.
        """
        index, folder = index_of(stream), Path(stream.local, stream.split)
        name = f"{self.name}-{shards_sha256(index)[:16]}-{self.fingerprint}.npz"
        path = fetch_beside_index(stream, name)
        kept = None if path is None else read_arrays(path, self.form)
        if kept is not None:
            return kept
        begin = time.monotonic()
        try:
            counts = self._count(stream)
        except DamagedRecordsError as error:
            if not stream.remote:
                raise
            log.warning("%s: fetching it again", error)
            (folder / RECORDS_FILE).unlink()
            counts = self._count(stream)
        seconds = time.monotonic() - begin
        num_samples = sum(shard["samples"] for shard in index["shards"])
        log.info("%s: counted %d samples for %s in %.0f s", folder, num_samples, self.what, seconds)
        _keep(counts, folder / name)
        return counts

    def _count(self, stream: Stream) -> Counts:
        records = fetch_beside_index(stream, RECORDS_FILE)
        if records is None:
            raise ValueError(
                f"{Path(stream.local, stream.split)} has no {RECORDS_FILE} beside its {INDEX_FILE}, so its lengths are "
                f"unknown: convert the data set anew, or {self.remedy}"
            )
        samples = read_records(records, index_of(stream))
        return self.count(tqdm(samples, unit=" samples", desc="count", disable=None))


def count_on_rank_0(streams: Sequence[Stream], kept: KeptCount[Counts]) -> list[Counts]:
    """The count of each stream, made by global rank 0 and told to all ranks."""
    found: list[Counts] = []
    error = None
    if dist.get_global_rank() == 0:
        try:
            found = [kept.of(stream) for stream in streams]
        except Exception as raised:  # raised by all ranks
            error = raised
    agree(error)
    told = [found]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def _keep(counts: Any, path: Path) -> None:
    try:
        write_arrays(path, counts)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next run counts again", path, error.strerror)


def index_of(stream: Stream) -> dict[str, Any]:
    """The parsed index.json of a stream."""
    return json.loads(Path(stream.local, stream.split, INDEX_FILE).read_text(encoding="utf-8"))
