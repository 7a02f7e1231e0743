"""Write and check the manifest of each checkpoint; find the newest valid one."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from composer.utils import maybe_create_object_store_from_uri, parse_uri
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from recipe.checkpoints.base import fingerprint
from recipe.models.network import AVERAGE
from recipe.models.nf4 import plain_shapes
from recipe.records import PARTIAL, write_whole
from recipe.redact import redact

MANIFEST = "manifest.json"
UNFINISHED = f".unfinished{PARTIAL}"  # suffix of an empty file that exists until the checkpoint has its manifest
NO_MANIFEST = "no manifest"  # why a checkpoint is not read
REPLACED = ".replaced"  # suffix of a manifest that no longer counts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileEntry:
    """Hold a file's size in bytes and its SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Origin:
    """What a run was made from.

    Attributes:
        config: The whole configuration, without secrets.
        tokenizer: Fingerprint of the tokenizer and its chat template.
        model: Fingerprint of the names and shapes of all parameters but averages.
        base: Fingerprint of the weights that its checkpoints leave out; None: they hold all.
    """

    config: dict[str, Any]
    tokenizer: str
    model: str
    base: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Describe one checkpoint."""

    files: dict[str, FileEntry]  # by their paths below the manifest's folder
    timestamp: dict[str, int]  # finished `epoch`, `batch`, `sample` and `token`
    origin: Origin  # of the run that wrote it
    world_size: int  # ranks of that run
    sharded: bool  # a folder with files of each rank
    weights_only: bool  # lacks what training needs to continue
    metric: dict[str, float]  # name and value, if it was kept as the best; else empty
    # What the batch's evaluation measured after the checkpoint was written; None: it had not ended; {}: it was not due.
    scores: dict[str, float] | None = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Return the number of finished batches."""
        return self.timestamp["batch"]

    @property
    def progress(self) -> tuple[int, int]:
        """Return what orders checkpoints: an epoch's last batch may have one before and one after the epoch's end."""
        return self.timestamp["batch"], self.timestamp["epoch"]


def describe(
    saved: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, model: nn.Module, base: Mapping[str, Tensor]
) -> Origin:
    """Return what this run is made from.

    Args:
        saved: The run's configuration, from `configure.as_saved`.
        tokenizer: A fast one.
        model: Not yet sharded.
        base: The weights of the base model that the run never trains, by name.
    """
    backend: Any = tokenizer
    shapes = plain_shapes({name: parameter for name, parameter in model.named_parameters() if AVERAGE not in name})
    return Origin(
        config=json.loads(json.dumps(saved, default=str)),
        tokenizer=_sha256([backend.backend_tokenizer.to_str(), tokenizer.chat_template]),
        model=_sha256(shapes),
        base=fingerprint(base) if base else None,
    )


def manifest_of(checkpoint: str, sharded: bool) -> str:
    """Return the path of a checkpoint's manifest."""
    return f"{checkpoint}/{MANIFEST}" if sharded else f"{checkpoint}.{MANIFEST}"


def checkpoint_of(manifest: str) -> str | None:
    """Return the path of a manifest's checkpoint; None if the path is not a manifest's."""
    if PurePosixPath(manifest).name == MANIFEST:
        return str(PurePosixPath(manifest).parent)
    return manifest.removesuffix(f".{MANIFEST}") if manifest.endswith(f".{MANIFEST}") else None


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write it whole or not at all, with a checksum over itself."""
    body = asdict(manifest)
    write_whole(path, json.dumps({"sha256": _sha256(body), **body}, indent=1).encode())


def parse_manifest(text: str | bytes) -> Manifest:
    """Return a manifest from its text.

    Raises:
        ValueError: It is truncated, was changed, or is another program's.
    """
    body = json.loads(text)
    if not isinstance(body, dict) or body.pop("sha256", None) != _sha256(body):
        raise ValueError("its own checksum is wrong")
    files = {name: FileEntry(**entry) for name, entry in body.pop("files").items()}
    return Manifest(files=files, origin=Origin(**body.pop("origin")), **body)


def verify(manifest: Manifest, folder: Path) -> str | None:
    """Return why the files in the manifest's folder are not as it says; None if they are."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.size:
            return f"{name} has {path.stat().st_size} bytes instead of {entry.size}"
        if describe_file(path) != entry:
            return f"{name} has another SHA-256 than when it was written"
    return None


def describe_file(path: Path) -> FileEntry:
    """Return a file's current size and checksum."""
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the keys in which two configurations differ, as `key: old -> new`."""
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


@dataclass(frozen=True)
class Found:
    """Name a checkpoint whose bytes are all as written."""

    path: str  # or address, for the Trainer's `load_path`: a file, or a sharded checkpoint's folder
    manifest: Manifest


@dataclass(frozen=True)
class LocalFolder:
    """Read checkpoints of a folder on disk."""

    path: Path

    def names(self) -> list[str]:
        """Return the paths of all files below; no links."""
        paths = [path for path in self.path.rglob("*") if path.is_file() and not path.is_symlink()]
        return [path.relative_to(self.path).as_posix() for path in paths]

    def size(self, name: str) -> int | None:
        """Return a file's bytes; None if there is no such file."""
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def fetch(self, names: Sequence[str], scratch: Path) -> Path:
        """Return the folder in which the names can be read."""
        return self.path

    def address(self, name: str) -> str:
        """Return the full path of a name."""
        return str(self.path / name)


@dataclass(frozen=True)
class StoreFolder:
    """Read checkpoints of an object store, below an address such as `s3://bucket/run/checkpoints`."""

    uri: str

    @property
    def _store(self) -> Any:
        return maybe_create_object_store_from_uri(self.uri)

    def names(self) -> list[str]:
        """Return the names of all objects below."""
        prefix = f"{parse_uri(self.uri)[2].rstrip('/')}/".lstrip("/")
        return [name.removeprefix(prefix) for name in self._store.list_objects(prefix)]

    def size(self, name: str) -> int | None:
        """Return an object's bytes; None if there is no such object."""
        try:
            return self._store.get_object_size(parse_uri(self.address(name))[2])
        except FileNotFoundError:
            return None

    def fetch(self, names: Sequence[str], scratch: Path) -> Path:
        """Download the objects to the scratch folder and return it."""
        store = self._store
        for name in names:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            store.download_object(parse_uri(self.address(name))[2], str(scratch / name), overwrite=True)
        return scratch

    def address(self, name: str) -> str:
        """Return the full address of a name."""
        return f"{self.uri.rstrip('/')}/{name}"


def open_folder(folder: str) -> LocalFolder | StoreFolder:
    """Return the folder of a path or address."""
    return StoreFolder(folder) if "://" in folder else LocalFolder(Path(folder))


def newest_valid(folder: str) -> Found | None:
    """Return the whole and unchanged checkpoint of the highest batch; warn of each one skipped.

    Args:
        folder: A path or an address. From a store, a checkpoint is downloaded to be checked.
    """
    place = open_folder(folder)
    manifests, rejected = read_manifests(place)
    for name, reason in rejected.items():
        _warn(place.address(name), reason)
    # If the best checkpoint has two names, the one it was saved under comes first.
    order = {name: (manifest.progress, not manifest.metric) for name, manifest in manifests.items()}
    for name in sorted(order, key=lambda name: order[name], reverse=True):
        manifest = manifests[name]
        reason = check(place, name, manifest)
        if reason is None and manifest.weights_only:
            reason = "it holds only weights, so training cannot continue from it"
        if reason is None:
            return Found(place.address(name), manifest)
        _warn(place.address(name), reason)
    return None


def existing(folder: str) -> list[str]:
    """Return the names of all checkpoints in a folder or store, valid or not, except those never finished."""
    place = open_folder(folder)
    names = place.names()
    unfinished = {name.removesuffix(UNFINISHED) for name in names if name.endswith(UNFINISHED)}
    unfinished -= {checkpoint_of(name) for name in names}
    found = {found for name in names if (found := _checkpoint_in(name)) is not None} - unfinished
    if isinstance(place, StoreFolder):  # uploads of a killed run, or to a store that failed, end anywhere
        manifests, rejected = read_manifests(place)
        found -= {name for name, reason in rejected.items() if reason == NO_MANIFEST}
        found -= {name for name, manifest in manifests.items() if not set(_paths(name, manifest)) <= set(names)}
    return sorted(found)


def clean(folder: Path, batch: int) -> None:
    """Remove half-written files of a killed run and set aside checkpoints later than `batch`, this run's start.

    Those are broken, or this run was started over and must not resume from what it replaces.
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
            log.warning("checkpoint %s is set aside: this run starts before it, at batch %d", folder / name, batch)


def best_metric(place: LocalFolder | StoreFolder, name: str) -> dict[str, float]:
    """Return the metric by which a checkpoint was kept as the best; {} if it was never finished or is damaged."""
    try:
        manifest = read_manifest(place, name)
    except ValueError:
        return {}
    return {} if manifest is None else manifest.metric


def read_manifests(place: LocalFolder | StoreFolder) -> tuple[dict[str, Manifest], dict[str, str]]:
    """Return a folder's manifests by checkpoint name, and why the other checkpoints have none."""
    names = place.names()
    manifests: dict[str, Manifest] = {}
    rejected = {found: NO_MANIFEST for name in names if (found := _checkpoint_in(name)) is not None}
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
    """Return the manifest of one checkpoint; None if it has none.

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
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{place.address(path)} cannot be read: {error}: give another checkpoint") from error
    return None


def check(place: LocalFolder | StoreFolder, name: str, manifest: Manifest) -> str | None:
    """Return why a checkpoint is not as its manifest says; None if it is. Sizes are compared before reading all."""
    paths = _paths(name, manifest)
    for path, entry in paths.items():
        size = place.size(path)
        if size != entry.size:
            return f"{path} is missing" if size is None else f"{path} has {size} bytes instead of {entry.size}"
    with TemporaryDirectory() as scratch:
        return verify(manifest, place.fetch(list(paths), Path(scratch)) / _folder_of(name, manifest))


def _folder_of(name: str, manifest: Manifest) -> str:
    return name if manifest.sharded else str(PurePosixPath(name).parent)


def _paths(name: str, manifest: Manifest) -> dict[str, FileEntry]:
    """Return the entries of a checkpoint's files by their paths in the folder of all checkpoints."""
    return {str(PurePosixPath(_folder_of(name, manifest), file)): entry for file, entry in manifest.files.items()}


def _checkpoint_in(name: str) -> str | None:
    """Return the checkpoint that a file belongs to, by its name."""
    path = PurePosixPath(name)
    if path.name.endswith(".distcp") or path.name == ".metadata":
        return str(path.parent)
    return name if path.suffix == ".pt" else checkpoint_of(name)


def _warn(address: str, reason: str) -> None:
    log.warning("checkpoint %s is skipped: %s", redact(address), reason)
