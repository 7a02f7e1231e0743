"""Small data sets of numbered rows, and ways to break and to read them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streaming import MDSWriter
from torch.utils.data import DataLoader

from recipe.upstream.storage import CheckedDataset, open_streams

NUM_ROWS = 40
NUM_SHARDS = 10
BATCH_SIZE = 2  # half a shard: so two workers wait for the same one


def write_rows(folder: Path, **settings: Any) -> Path:
    """Writes `NUM_ROWS` rows in `NUM_SHARDS` shards of some 2 kB."""
    keywords = {"hashes": ["xxh64"], "size_limit": 2300, **settings}
    with MDSWriter(out=str(folder), columns={"number": "int", "data": "bytes"}, **keywords) as writer:
        for number in range(NUM_ROWS):
            writer.write({"number": number, "data": bytes([number]) * 500})
    assert len(json.loads((folder / "index.json").read_text())["shards"]) == NUM_SHARDS
    return folder


def open_rows(stream: Mapping[str, Any], **settings: Any) -> CheckedDataset:
    return CheckedDataset(streams=open_streams({"rows": stream}), batch_size=BATCH_SIZE, **settings)


def read_numbers(dataset: Any, num_workers: int = 0) -> list[int]:
    """The numbers of one epoch, sorted; every row's bytes are looked at."""
    numbers = []
    for batch in DataLoader(
        dataset, batch_size=BATCH_SIZE, num_workers=num_workers, collate_fn=list, timeout=60 * bool(num_workers)
    ):
        for row in batch:
            assert row["data"] == bytes([row["number"]]) * 500
            numbers.append(row["number"])
    return sorted(numbers)


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
