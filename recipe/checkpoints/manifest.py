"""A checkpoint's manifest: written after it, it tells whether the checkpoint is whole and what it was made from.

Beside a file `ba4.pt` lies `ba4.pt.manifest.json`; in a sharded folder, `manifest.json`.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from recipe.config import RecipeConfig
from recipe.redact import redact

MANIFEST = "manifest.json"
PARTIAL = ".partial"  # ends the name of a file that is being written
UNFINISHED = f".unfinished{PARTIAL}"  # ends the name of an empty file, there until the checkpoint has its manifest


@dataclass(frozen=True)
class FileEntry:
    """What a file must be, in bytes and by its SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Origin:
    """What a run is made from.

    Attributes:
        config: All of it, without secrets.
        tokenizer: Fingerprint of the tokenizer and its chat template.
        model: Fingerprint of the names and shapes of all parameters.
    """

    config: dict[str, Any]
    tokenizer: str
    model: str


@dataclass(frozen=True)
class Manifest:
    """Of one checkpoint.

    Attributes:
        files: By their paths below the manifest's folder.
        timestamp: Finished `epoch`, `batch`, `sample` and `token`.
        origin: Of the run that wrote it.
        world_size: Ranks of that run.
        sharded: Whether it is a folder with a file of each rank.
        weights_only: Whether it lacks all that training needs to go on.
        metric: Name and value of the one it was kept for as the best; else empty.
    """

    files: dict[str, FileEntry]
    timestamp: dict[str, int]
    origin: Origin
    world_size: int
    sharded: bool
    weights_only: bool
    metric: dict[str, float]

    @property
    def batch(self) -> int:
        """Finished batches."""
        return self.timestamp["batch"]

    @property
    def progress(self) -> tuple[int, int]:
        """Orders checkpoints: after the last batch of an epoch there may be one before and one after its end."""
        return self.timestamp["batch"], self.timestamp["epoch"]


def describe(config: RecipeConfig, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> Origin:
    """What this run is made from.

    Args:
        config: The run's.
        tokenizer: A fast one.
        model: Before any rank takes a part of it.
    """
    backend: Any = tokenizer
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    return Origin(
        config=json.loads(json.dumps(redact(asdict(config)), default=str)),
        tokenizer=_sha256([backend.backend_tokenizer.to_str(), tokenizer.chat_template]),
        model=_sha256(shapes),
    )


def manifest_of(checkpoint: str, sharded: bool) -> str:
    """The path of a checkpoint's manifest."""
    return f"{checkpoint}/{MANIFEST}" if sharded else f"{checkpoint}.{MANIFEST}"


def checkpoint_of(manifest: str) -> str | None:
    """The path of a manifest's checkpoint; None where the path is no manifest's."""
    if PurePosixPath(manifest).name == MANIFEST:
        return str(PurePosixPath(manifest).parent)
    return manifest.removesuffix(f".{MANIFEST}") if manifest.endswith(f".{MANIFEST}") else None


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Writes it whole or not at all, with a checksum over itself."""
    body = asdict(manifest)
    write_whole(path, json.dumps({"sha256": _sha256(body), **body}, indent=1).encode())


def parse_manifest(text: str | bytes) -> Manifest:
    """Reads a manifest.

    Raises:
        ValueError: It is truncated, was changed, or is another program's.
    """
    body = json.loads(text)
    if not isinstance(body, dict) or body.pop("sha256", None) != _sha256(body):
        raise ValueError("its own checksum is wrong")
    files = {name: FileEntry(**entry) for name, entry in body.pop("files").items()}
    return Manifest(files=files, origin=Origin(**body.pop("origin")), **body)


def verify(manifest: Manifest, folder: Path) -> str | None:
    """Why the files in the manifest's folder are not what it says; None where they are."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.size:
            return f"{name} has {path.stat().st_size} bytes instead of {entry.size}"
    for name, entry in manifest.files.items():
        if describe_file(folder / name) != entry:
            return f"{name} has another SHA-256 than when it was written"
    return None


def describe_file(path: Path) -> FileEntry:
    """Size and checksum of a file as it is now."""
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys in which two configurations differ, as `key: old -> new`."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, "absent") != after.get(key, "absent")
    ]


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under another name, flushes it to the disk, then renames it."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        rename(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def rename(source: Path, target: Path) -> None:
    """Renames a file, replacing any at its place; the new name survives a loss of power."""
    source.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _flatten(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flatten(item, f"{above}{key}.")
        else:
            yield f"{above}{key}", item


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
