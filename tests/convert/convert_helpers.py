"""What the tests of the converters share: tiny images, command lines run in-process, shards read back."""

import importlib
import io
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from streaming import StreamingDataset

from convert.items import Entry, Found, Item
from recipe.schema import Sample


@dataclass(frozen=True)
class Slow:
    """Another entry, read after some seconds."""

    entry: Entry
    seconds: float

    def fingerprint(self) -> str:
        return self.entry.fingerprint()

    def origin(self) -> Any:
        return self.entry.origin()

    def read(self) -> Iterator[Item]:
        time.sleep(self.seconds)
        yield from self.entry.read()


def picture(size: tuple[int, int] = (20, 10), mode: str = "RGB", kind: str = "JPEG", **save: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 1).save(buffer, format=kind, **save)
    return buffer.getvalue()


def rotated_picture(size: tuple[int, int] = (20, 10)) -> bytes:
    """Stored as `size`, displayed turned by 90 degrees."""
    exif = Image.Exif()
    exif[274] = 6
    return picture(size, exif=exif)


def run_main(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    """`python -m convert.NAME ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    importlib.import_module(f"convert.{name}").main()


def read_items(found: Found) -> list[Item]:
    """All items of a data set, in order."""
    return [*found.leading, *chain.from_iterable(entry.read() for entry in found.entries)]


def read_samples(out: Path, split: str | None = "train") -> list[Sample]:
    """The samples at `out`, read as training reads them."""
    dataset = StreamingDataset(local=str(out), split=split, batch_size=1, shuffle=False)
    return [Sample.from_mds(dataset[index]) for index in range(dataset.num_samples)]


def read_rejected(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path
