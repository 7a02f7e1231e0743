"""Check checkpoints: the manifest written after each one, and the newest one that can be trusted."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from composer.utils import maybe_create_object_store_from_uri, parse_uri
from torch import nn
from transformers import PreTrainedTokenizerBase

from recipe.records import PARTIAL, write_whole
from recipe.redact import redact
from recipe.schema import Origin

MANIFEST = "manifest.json"
UNFINISHED = f".unfinished{PARTIAL}"  # ends the name of an empty file, there until the checkpoint has its manifest


@dataclass(frozen=True)
class FileEntry:
    """What a file must be, in bytes and by its SHA-256."""

    size: int
    sha256: str


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


def describe(saved: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> Origin:
    """Return what this run is made from.

    Args:
        saved: The run's configuration, from `configure.as_saved`.
        tokenizer: A fast one.
        model: Before any rank takes a part of it.
    """
    backend: Any = tokenizer
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    return Origin(
        config=json.loads(json.dumps(saved, default=str)),
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


def _flatten(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flatten(item, f"{above}{key}.")
        else:
            yield f"{above}{key}", item


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


log = logging.getLogger(__name__)

REPLACED = ".replaced"  # ends the name of a manifest that counts no more


@dataclass(frozen=True)
class Found:
    """A checkpoint whose every byte is as it was written.

    Attributes:
        path: For the Trainer's `load_path`: of a file, or of a sharded checkpoint's folder; or its address.
        manifest: Of it.
    """

    path: str
    manifest: Manifest


@dataclass(frozen=True)
class LocalFolder:
    """Files on a disk."""

    path: Path

    def names(self) -> list[str]:
        """Of all files below, but for links to others."""
        paths = [path for path in self.path.rglob("*") if path.is_file() and not path.is_symlink()]
        return [path.relative_to(self.path).as_posix() for path in paths]

    def size(self, name: str) -> int | None:
        """Bytes; None where there is no such file."""
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def fetch(self, names: Sequence[str], scratch: Path) -> Path:
        """The folder in which they can be read."""
        return self.path

    def address(self, name: str) -> str:
        """Of a file or folder in it."""
        return str(self.path / name)


@dataclass(frozen=True)
class StoreFolder:
    """Objects of a store below an address such as `s3://bucket/run/checkpoints`."""

    uri: str

    def names(self) -> list[str]:
        """Of all objects below."""
        store = maybe_create_object_store_from_uri(self.uri)
        assert store is not None
        prefix = f"{parse_uri(self.uri)[2].rstrip('/')}/".lstrip("/")
        return [name.removeprefix(prefix) for name in store.list_objects(prefix)]

    def size(self, name: str) -> int | None:
        """Bytes; None where there is no such object."""
        store = maybe_create_object_store_from_uri(self.uri)
        assert store is not None
        try:
            return store.get_object_size(parse_uri(self.address(name))[2])
        except FileNotFoundError:
            return None

    def fetch(self, names: Sequence[str], scratch: Path) -> Path:
        """Downloads them; returns the folder."""
        store = maybe_create_object_store_from_uri(self.uri)
        assert store is not None
        for name in names:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            store.download_object(parse_uri(self.address(name))[2], str(scratch / name), overwrite=True)
        return scratch

    def address(self, name: str) -> str:
        """Of an object, or of those with a common beginning."""
        return f"{self.uri.rstrip('/')}/{name}"


def open_folder(folder: str) -> LocalFolder | StoreFolder:
    """A folder by its path or address."""
    return StoreFolder(folder) if "://" in folder else LocalFolder(Path(folder))


def newest_valid(folder: str) -> Found | None:
    """The checkpoint of the highest batch that is whole and unchanged; those passed over are told as warnings.

    Args:
        folder: Of the checkpoints; or an address. From a store, a checkpoint is downloaded to be checked.
    """
    place = open_folder(folder)
    manifests, rejected = read_manifests(place)
    for name, reason in rejected.items():
        _warn(place.address(name), reason)
    # Of two names of one checkpoint, the one it was saved under before the one of the best.
    order = {name: (manifest.progress, not manifest.metric) for name, manifest in manifests.items()}
    for name in sorted(order, key=lambda name: order[name], reverse=True):
        manifest = manifests[name]
        reason = check(place, name, manifest)
        if reason is None and manifest.weights_only:
            reason = "it holds only weights, training cannot go on from it"
        if reason is None:
            return Found(place.address(name), manifest)
        _warn(place.address(name), reason)
    return None


def existing(folder: str) -> list[str]:
    """The names of all checkpoints in a folder or store, valid or not, but those that were never finished."""
    names = open_folder(folder).names()
    unfinished = {name.removesuffix(UNFINISHED) for name in names if name.endswith(UNFINISHED)}
    unfinished -= {checkpoint_of(name) for name in names}
    return sorted({found for name in names if (found := _checkpoint_in(name)) is not None} - unfinished)


def clean(folder: Path, batch: int) -> None:
    """Of a run that begins at a batch: what a killed one left half written goes, and later checkpoints are set aside.

    They are broken, or the run was told to start anew and must not be resumed from what it replaces.
    """
    for path in folder.rglob(f"*{PARTIAL}"):
        checkpoint = Path(str(path).removesuffix(UNFINISHED))
        if checkpoint != path and not any(Path(manifest_of(str(checkpoint), kind)).exists() for kind in (False, True)):
            if checkpoint.is_dir():
                shutil.rmtree(checkpoint)
            else:
                checkpoint.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    for name, manifest in read_manifests(LocalFolder(folder))[0].items():
        if manifest.batch > batch:
            path = folder / manifest_of(name, manifest.sharded)
            path.replace(f"{path}{REPLACED}")
            log.warning("checkpoint %s is set aside: the run begins before it, at batch %d", folder / name, batch)


def has_manifest(place: LocalFolder | StoreFolder, name: str) -> bool:
    """Whether a checkpoint was finished."""
    return any(place.size(manifest_of(name, sharded)) is not None for sharded in (False, True))


def read_manifests(place: LocalFolder | StoreFolder) -> tuple[dict[str, Manifest], dict[str, str]]:
    """The manifests of a folder by their checkpoints' names, and why the other checkpoints have none."""
    names = place.names()
    manifests: dict[str, Manifest] = {}
    rejected = {found: "no manifest" for name in names if (found := _checkpoint_in(name)) is not None}
    rejected |= {name: "its run ended while it was being written" for name in names if name.endswith(PARTIAL)}
    with TemporaryDirectory() as scratch:
        for name in names:
            checkpoint = checkpoint_of(name)
            if checkpoint is None:
                continue
            try:
                text = (place.fetch([name], Path(scratch)) / name).read_bytes()
                manifests[checkpoint] = parse_manifest(text)
                rejected.pop(checkpoint, None)
            except (ValueError, TypeError, KeyError, FileNotFoundError) as error:
                rejected[checkpoint] = f"its manifest cannot be read: {error}"
    return manifests, rejected


def read_manifest(place: LocalFolder | StoreFolder, name: str) -> Manifest | None:
    """The manifest of one checkpoint; None where it has none.

    Raises:
        ValueError: It cannot be read.
    """
    for sharded in (False, True):
        path = manifest_of(name, sharded)
        if place.size(path) is None:
            continue
        with TemporaryDirectory() as scratch:
            text = (place.fetch([path], Path(scratch)) / path).read_bytes()
        try:
            return parse_manifest(text)
        except (json.JSONDecodeError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{place.address(path)} cannot be read: {error}: give another checkpoint") from error
    return None


def check(place: LocalFolder | StoreFolder, name: str, manifest: Manifest) -> str | None:
    """Why a checkpoint is not what its manifest says; None where it is. Sizes are compared before all is read."""
    folder = name if manifest.sharded else str(PurePosixPath(name).parent)
    paths = {str(PurePosixPath(folder, file)): entry for file, entry in manifest.files.items()}
    for path, entry in paths.items():
        size = place.size(path)
        if size != entry.size:
            return f"{path} is missing" if size is None else f"{path} has {size} bytes instead of {entry.size}"
    with TemporaryDirectory() as scratch:
        return verify(manifest, place.fetch(list(paths), Path(scratch)) / folder)


def _checkpoint_in(name: str) -> str | None:
    """The checkpoint that a file belongs to, by its name."""
    path = PurePosixPath(name)
    if path.name.endswith(".distcp") or path.name == ".metadata":
        return str(path.parent)
    return name if path.suffix == ".pt" else checkpoint_of(name)


def _warn(address: str, reason: str) -> None:
    log.warning("checkpoint %s is passed over: %s", redact(address), reason)
