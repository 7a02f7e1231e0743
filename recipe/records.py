"""The records beside an index: every column but the image; and the index of shards itself."""

import gzip
import hashlib
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from streaming.base.format import FileInfo

from recipe.schema import Sample

INDEX_FILE = "index.json"
_FILE_KEYS = (("raw_data", "zip_data"), ("raw_meta", "zip_meta"))


def parse_index(path: Path) -> dict[str, Any]:
    """Reads an index.json and checks all that this module relies on.

    Raises:
        ValueError: What is wrong, in words that follow the file's name.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version, shards = index["version"], [file_pairs(shard) for shard in index["shards"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is truncated or not an index of shards ({type(error).__name__}: {error})") from None
    if version != 2:
        raise ValueError(f"is of version {version}, not 2")
    for info in (info for pairs in shards for pair in pairs for info in pair if info):
        name = PurePosixPath(info.basename)
        if name.is_absolute() or ".." in name.parts or not name.name:
            raise ValueError(f"names a file outside its folder, {info.basename!r}: do not use this data set")
    return index


def file_pairs(shard: Mapping[str, Any]) -> list[tuple[FileInfo, FileInfo | None]]:
    """(raw, compressed or None) of the files of a shard in an index."""
    pairs = []
    for raw, packed in _FILE_KEYS:
        if raw in shard or raw == "raw_data":
            compressed = shard.get(packed)
            pairs.append((FileInfo(**shard[raw]), FileInfo(**compressed) if compressed else None))
    return pairs


RECORDS_FILE = "records.jsonl.gz"  # no *.json: Streaming's merge_index would take it for an index
_VERSION = 1
# What a damaged file leads to: gzip hands on what it has unpacked before it compares the checksum behind it.
_DAMAGE = (
    OSError,
    EOFError,
    zlib.error,
    UnicodeDecodeError,
    json.JSONDecodeError,
    KeyError,
    TypeError,
    AttributeError,
)


class DamagedRecordsError(ValueError):
    """The file is not what was written, or not of this index."""


def shards_sha256(index: Mapping[str, Any]) -> str:
    """The fingerprint of the shards that a parsed index.json lists: names, sizes, counts and checksums."""
    return hashlib.sha256(json.dumps(index["shards"], sort_keys=True).encode()).hexdigest()


def to_record(sample: Sample) -> dict[str, Any]:
    """A line of the file: the sample's MDS row without its picture."""
    row = sample.to_mds()
    del row["image"]
    return row


def write_part(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes the lines of one part, of which `join_parts` makes the file; equal records give equal bytes.

    Args:
        path: Of the part.
        records: From `to_record`, in the order of the shards.
    """
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as file:
        for record in records:
            file.write(json.dumps(record).encode() + b"\n")


def join_parts(path: Path, parts: Iterable[Path], index: Mapping[str, Any]) -> None:
    """Writes the file: its first line and all parts, which gzip reads as one.

    Args:
        path: Of the file.
        parts: From `write_part`, in the order of the shards.
        index: The parsed index.json.
    """
    write_part(path, [{"version": _VERSION, "shards_sha256": shards_sha256(index)}])
    with path.open("ab") as file:
        for part in parts:
            with part.open("rb") as lines:
                shutil.copyfileobj(lines, file)


def read_records(path: Path, index: Mapping[str, Any]) -> Iterator[Sample]:
    """The samples in stored order, without their pictures: `width` tells which have one.

    Args:
        path: Of the file.
        index: The parsed index.json beside it.

    Raises:
        DamagedRecordsError: The file is damaged, or was written for other shards.
    """
    remedy = "convert the data set anew"
    expected = sum(shard["samples"] for shard in index["shards"])
    found = 0
    try:
        with gzip.open(path, "rb") as file:
            header = json.loads(file.readline())
            if header.get("version") != _VERSION or header.get("shards_sha256") != shards_sha256(index):
                raise DamagedRecordsError(f"{path} was written for other shards than its index.json lists: {remedy}")
            for line in file:
                yield Sample.from_mds({**json.loads(line), "image": b""})
                found += 1
    except _DAMAGE as error:
        raise DamagedRecordsError(f"{path} cannot be read ({error!r}): {remedy}") from error
    if found != expected:
        raise DamagedRecordsError(f"{path} holds {found} records, its index.json {expected} samples: {remedy}")
