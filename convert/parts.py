"""Parts of a conversion: a fixed number of records, read, checked and written by one process.

A finished part is a marker file in the staging folder, which tells what the part was made from and what came of it.
It appears by a rename, after everything it speaks of is safe on disk or in the object store, so that a conversion
that was killed goes on after its finished parts.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from streaming import MDSWriter

from convert.items import Entry, Rejected, Summary
from convert.store import upload
from recipe.records import to_record, write_part
from recipe.schema import MDS_COLUMNS, Sample

PART_RECORDS = 1024  # never depends on the number of workers: it decides where shards end
_VERSION = 1  # raise it when a converter makes something else of the same record


@dataclass(frozen=True)
class Job:
    """What every part of a conversion shares.

    Attributes:
        entries: All records.
        staging: Folder of markers and unfinished parts.
        address: Object store that finished shards go to; None: they wait in `data`.
        stored: Names of the shards in that store at the start, None where it cannot list them.
        part_records: Records of a part.
        hashes: Checksums kept in the index, sorted.
        size_limit: Bytes of one shard, as `MDSWriter` takes it.
        strict: A part ends at its first rejected record.
        restartable: Finished parts of an earlier run are kept.
    """

    entries: Sequence[Entry]
    staging: Path
    address: str | None
    stored: frozenset[str] | None
    part_records: int
    hashes: tuple[str, ...]
    size_limit: int | str
    strict: bool
    restartable: bool

    @property
    def num_parts(self) -> int:
        """Parts of the data set, at least one."""
        return max(1, -(-len(self.entries) // self.part_records))

    @property
    def data(self) -> Path:
        """Folder that becomes the data set, or what is uploaded last."""
        return self.staging / "data"

    def records_file(self, number: int) -> Path:
        """The part's lines of the sidecar."""
        return self.staging / f"{number:05d}.records.gz"


@dataclass
class Part:
    """What came of a part, as its marker holds it; `kept`: by an earlier run."""

    fingerprint: str
    shards: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    summary: Summary = field(default_factory=Summary)
    kept: bool = False


def make_part(job: Job, number: int, advance: Callable[[int], object]) -> Part:
    """Reads and writes part `number`, or finds that an earlier run did.

    Args:
        job: The conversion.
        number: Of the part, from 0.
        advance: Told the number of records that are done.

    Raises:
        ValueError: An entry cannot be read at all.
        OSError: The disk or the object store failed.
    """
    entries = job.entries[number * job.part_records : (number + 1) * job.part_records]
    marker = job.staging / f"{number:05d}.json"
    fingerprint = _fingerprint(job, entries) if job.restartable else ""
    part = _load_part(job, marker, fingerprint) if job.restartable else None
    if part is not None and _is_whole(job, part, number):
        advance(len(entries))
        return part
    marker.unlink(missing_ok=True)
    part = _write_part(job, number, entries, fingerprint, advance)
    _save_part(marker, part)
    return part


def write_durably(path: Path, text: str) -> None:
    """Puts the file in place by a rename, with its bytes on disk before and its name on disk after."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    sync(new)
    new.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _ShardWriter(MDSWriter):
    """`MDSWriter`, which flushes an empty shard when the first sample alone is over `size_limit`."""

    def flush_shard(self) -> None:
        if self.new_samples:
            super().flush_shard()


def _fingerprint(job: Job, entries: Iterable[Entry]) -> str:
    digest = hashlib.sha256(repr((_VERSION, dict(MDS_COLUMNS), job.hashes, job.size_limit, job.strict)).encode())
    for entry in entries:
        digest.update(entry.fingerprint().encode(errors="surrogatepass") + b"\n")
    return digest.hexdigest()


def _save_part(marker: Path, part: Part) -> None:
    rejected = [asdict(item) for item in part.rejected]
    value = {
        "fingerprint": part.fingerprint,
        "shards": part.shards,
        "rejected": rejected,
        "summary": vars(part.summary),
    }
    write_durably(marker, json.dumps(value))


def _load_part(job: Job, marker: Path, fingerprint: str) -> Part | None:
    """The part that the marker tells of, or None: there is none, or it was made from something else."""
    try:
        value = json.loads(marker.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if value["fingerprint"] != fingerprint:
        return None
    counts = value["summary"]
    summary = Summary(**{**counts, "notes": Counter(counts["notes"]), "rejected": Counter(counts["rejected"])})
    rejected = [Rejected(**item) for item in value["rejected"]]
    return Part(fingerprint, value["shards"], rejected, summary, kept=True)


def _is_whole(job: Job, part: Part, number: int) -> bool:
    """Nobody removed what the marker speaks of."""
    if not job.records_file(number).is_file():
        return False
    files = [shard["raw_data"] for shard in part.shards]
    if job.address is not None:
        return job.stored is None or all(file["basename"] in job.stored for file in files)
    paths = [(job.data / file["basename"], file["bytes"]) for file in files]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _write_part(
    job: Job, number: int, entries: Iterable[Entry], fingerprint: str, advance: Callable[[int], object]
) -> Part:
    """Leaves the shards in `job.data` or the object store, and the lines of the sidecar beside the marker."""
    folder = job.staging / f"{number:05d}.unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    part, records = Part(fingerprint), []
    writer = _ShardWriter(
        columns=dict(MDS_COLUMNS), out=str(folder), hashes=list(job.hashes), size_limit=job.size_limit
    )
    try:
        for entry in entries:
            for item in entry.read():
                part.summary.add(item)
                if isinstance(item, Sample):
                    writer.write(item.to_mds())
                    records.append(to_record(item))
                elif isinstance(item, Rejected):
                    part.rejected.append(item)
                    if job.strict:
                        break
            advance(1)
            if job.strict and part.rejected:
                break
        writer.flush_shard()
    finally:
        writer.executor.shutdown()  # not `finish`: it writes an index, after a second of waiting for no uploads
    part.shards = writer.shards
    _name_shards(folder, number, part.shards)
    write_part(job.records_file(number), records)
    sync(job.records_file(number))
    _hand_over(job, folder, [shard["raw_data"]["basename"] for shard in part.shards])
    return part


def _name_shards(folder: Path, number: int, shards: list[dict[str, Any]]) -> None:
    """Gives shards names that are the same for any number of workers and sort in order."""
    for position, shard in enumerate(shards):
        name = f"shard.{number:05d}.{position:05d}.mds"
        (folder / shard["raw_data"]["basename"]).rename(folder / name)
        shard["raw_data"]["basename"] = name


def _hand_over(job: Job, folder: Path, names: Sequence[str]) -> None:
    if job.address is not None:
        upload(folder, names, job.address)
    else:
        for name in names:
            sync(folder / name)
            (folder / name).replace(job.data / name)
        sync(job.data)
    shutil.rmtree(folder)
