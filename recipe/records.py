"""The files next to a data set's shards: `index.json`, records (columns without images), class names; how to write one.

`records.jsonl.gz` lets a run count the tokens of a data set without its images, for any tokenizer and prompt. Its
first line binds it to the shards of the index next to it.
"""

import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, UInt64

from recipe.schema import Sample

Parsed = TypeVar("Parsed")

INDEX_FILE = "index.json"
BLOCK = 1024  # records that one of several processes counts at once
PARTIAL = ".partial"  # ends the name of a file that is being written
_FILE_KEYS = (("raw_data", "zip_data"), ("raw_meta", "zip_meta"))


def usable_cores() -> int:
    """Return how many cores this process may use, which a scheduler can make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_whole(path: Path, content: bytes) -> None:
    """Write a file; after a crash it holds its old content or the new one, never a part.

    Raises:
        OSError: The disk is full or broken; nothing of the new content is left.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")  # two runs may write one cache
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        rename(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield another name to write to, then rename it to `path`; remove it on an error. Flush the content yourself."""
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)
    try:
        yield partial
        rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # a rename does nothing if both names are links to the same file


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder, replacing a file at `target`; the new name survives a loss of power."""
    source.replace(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class FileInfo:
    """A file in an index: the fields of Streaming's class of this name, which costs an import of torch."""

    basename: str
    bytes: int
    hashes: Mapping[str, str]


def parse_index(path: Path) -> dict[str, Any]:
    """Return a parsed index.json, checked as one that a stranger may have written.

    Raises:
        ValueError: What is wrong, worded to follow the file's name.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version, shards = index["version"], [file_pairs(shard) for shard in index["shards"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is truncated or not an index of shards ({type(error).__name__}: {error})") from None
    if version != 2:
        raise ValueError(f"is of version {version}, not 2")
    if any(_PICKLE in shard.get("column_encodings", ()) for shard in index["shards"]):
        raise ValueError("has a column of pickles, which can run programs: do not use this data set")
    for info in (info for pairs in shards for pair in pairs for info in pair if info):
        name = PurePosixPath(info.basename)
        if name.is_absolute() or ".." in name.parts or not name.name:
            raise ValueError(f"names a file outside its folder, {info.basename!r}: do not use this data set")
    return index


_PICKLE = "pkl"  # the one encoding of MDS that runs what it reads


def file_pairs(shard: Mapping[str, Any]) -> list[tuple[FileInfo, FileInfo | None]]:
    """Return (raw, compressed or None) for each file of a shard in an index."""
    pairs = []
    for raw, packed in _FILE_KEYS:
        if raw in shard or raw == "raw_data":
            compressed = shard.get(packed)
            pairs.append((FileInfo(**shard[raw]), FileInfo(**compressed) if compressed else None))
    return pairs


CLASSES_FILE = "classes.txt"  # a name per line, if the source lists its categories
RECORDS_FILE = "records.jsonl.gz"  # no *.json: Streaming's merge_index would take it for an index
_VERSION = 1
# What a damaged file raises: gzip returns what it has unpacked before it compares the checksum at the end.
_DAMAGE = (OSError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError)


class DamagedRecordsError(ValueError):
    """The file is not what was written, or was written for another index."""


def shards_sha256(index: Mapping[str, Any]) -> str:
    """Return the fingerprint of the shards of a parsed index.json: names, sizes, counts and checksums."""
    return hashlib.sha256(json.dumps(index["shards"], sort_keys=True).encode()).hexdigest()


def to_record(sample: Sample) -> dict[str, Any]:
    """Return a line of the file: the sample's MDS row, with `content_hash` of each image, or of a chat without one."""
    row = {column: value for column, value in sample.to_mds().items() if column != "image"}
    row |= {"image_hash": content_hash(sample.image or json.dumps(row["messages"]).encode())}
    return row | ({"further_hashes": [content_hash(item.image) for item in sample.further]} if sample.further else {})


def content_hash(content: bytes) -> str:
    """Return 16 hex digits, which decide whether the sample of an image or chat is held out."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def is_held_out(hashes: UInt64[np.ndarray, " N"], share: float) -> Bool[np.ndarray, " N"]:
    """Return which samples are validation: those whose hash is among the lowest `share` of all possible ones.

    The one rule of `val_fraction` in training and of `--val-share` in conversion.
    """
    return hashes < np.uint64(round(share * 2**64))


def write_part(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records (from `to_record`, in the order of the shards) as one part; equal records give equal bytes."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as file:
        for record in records:
            file.write(json.dumps(record).encode() + b"\n")


def join_parts(path: Path, parts: Iterable[Path], index: Mapping[str, Any]) -> None:
    """Write the file: a first line for `index`, then all `parts` in the order of the shards; gzip reads them as one."""
    write_part(path, [{"version": _VERSION, "shards_sha256": shards_sha256(index)}])
    with path.open("ab") as file:
        for part in parts:
            with part.open("rb") as lines:
                shutil.copyfileobj(lines, file)


def read_records(path: Path, index: Mapping[str, Any], part: tuple[int, int] = (0, 1)) -> Iterator[Sample]:
    """Yield the samples in stored order, without their images (`width` is 0 if there is none).

    `index` is the parsed index.json next to the file. With `part` (k, n) only every n-th block of `BLOCK` samples is
    parsed, from the k-th on, for n processes that read a file together.

    Raises:
        DamagedRecordsError: The file is damaged, or was written for other shards.
    """
    return _parse_lines(path, index, lambda line: Sample.from_mds({**line, "image": b""}), part)


def read_image_hashes(path: Path, index: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield `content_hash` of each sample's images, or of its chat without one, in stored order; as `read_records`.

    An image of several samples has one hash. If an earlier version of `convert/` wrote the file, it may be empty, and
    is that of the id without an image.
    """

    def parse(line: dict[str, Any]) -> list[str]:
        first = line.get("image_hash", "" if line["width"] else content_hash(line["id"].encode()))
        return [first, *line.get("further_hashes", ())]

    return _parse_lines(path, index, parse)


def _parse_lines(
    path: Path, index: Mapping[str, Any], parse: Callable[[dict[str, Any]], Parsed], part: tuple[int, int] = (0, 1)
) -> Iterator[Parsed]:
    remedy = "convert the data set again"
    expected, found = sum(shard["samples"] for shard in index["shards"]), 0
    try:
        with gzip.open(path, "rb") as file:
            header = json.loads(file.readline())
            if header.get("version") != _VERSION or header.get("shards_sha256") != shards_sha256(index):
                raise DamagedRecordsError(f"{path} was written for other shards than its index.json lists: {remedy}")
            for found, line in enumerate(file, 1):
                if (found - 1) // BLOCK % part[1] == part[0]:
                    yield parse(json.loads(line))
    except _DAMAGE as error:
        raise DamagedRecordsError(f"{path} cannot be read ({error!r}): {remedy}") from error
    if found != expected:
        raise DamagedRecordsError(f"{path} holds {found} records, its index.json {expected} samples: {remedy}")
