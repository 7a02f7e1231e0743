"""The index of a data set's shards, read as something that a stranger may have written."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from streaming.base.format import FileInfo

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
