"""Write and check the manifest of each checkpoint; find the newest valid one."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from recipe.checkpoints.base import fingerprint
from recipe.checkpoints.places import Place, open_folder
from recipe.models.network import AVERAGE
from recipe.models.nf4 import plain_shapes
from recipe.records import PARTIAL, write_whole
from recipe.redact import redact

MANIFEST = "manifest.json"
UNFINISHED = f".unfinished{PARTIAL}"  # suffix of an empty file that exists until the checkpoint has its manifest
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
        ValueError: It is truncated, was changed, is another program's, or names a file outside its folder.
    """
    body = json.loads(text)
    if not isinstance(body, dict) or body.pop("sha256", None) != _sha256(body):
        raise ValueError("its own checksum is wrong")
    files = {name: FileEntry(**entry) for name, entry in body.pop("files").items()}
    for path in map(PurePosixPath, files):
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"it names a file outside its folder, {str(path)!r}")
    return Manifest(files=files, origin=Origin(**body.pop("origin")), **body)


def verify(manifest: Manifest, folder: Path, names: Container[str] | None = None) -> str | None:
    """Return why the files in the manifest's folder, of `names` if given, are not as it says; None if they are."""
    for name, entry in manifest.files.items():
        if names is not None and name not in names:
            continue
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


def newest_valid(
    folder: str,
    scratch: Path | None = None,
    names_of: Callable[[Manifest], Container[str] | None] = lambda manifest: None,
    broken: Container[str] = (),
) -> Found | None:
    """Return the whole and unchanged checkpoint of the highest batch; warn of each one skipped.

    Args:
        folder: A path or an address. From a store, a checkpoint is downloaded to be checked.
        scratch: Of a store, an empty folder that keeps what was downloaded of the one that is returned.
        names_of: Gives the files of a checkpoint whose content is checked here; None: all.
        broken: Paths or addresses of checkpoints that are known not to be whole.
    """
    place = open_folder(folder)
    manifests, rejected = read_manifests(place)
    for name, reason in rejected.items():
        _warn(place.address(name), reason)
    # If the best checkpoint has two names, the one it was saved under comes first.
    order = {name: (manifest.progress, not manifest.metric) for name, manifest in manifests.items()}
    for name in sorted(order, key=lambda name: order[name], reverse=True):
        manifest = manifests[name]
        if place.address(name) in broken:
            continue
        reason = "it holds only weights, so training cannot continue from it" if manifest.weights_only else None
        reason = reason or check(place, name, manifest, scratch, names_of(manifest))
        if reason is None:
            return Found(place.address(name), manifest)
        _warn(place.address(name), reason)
    return None


def existing(folder: str) -> list[str]:
    """Return the names of all checkpoints in a folder or store, valid or not, except those never finished."""
    names = open_folder(folder).names()
    unfinished = {name.removesuffix(UNFINISHED) for name in names if name.endswith(UNFINISHED)}
    unfinished -= {checkpoint_of(name) for name in names}
    return sorted({found for name in names if (found := _checkpoint_in(name)) is not None} - unfinished)


def clean(place: Place, batch: int) -> None:
    """Remove half-written files of a killed run and set aside checkpoints later than `batch`, this run's start.

    Those are broken, or this run was started over and must not resume from what it replaces.
    """
    names = place.names()
    for name in (name for name in names if name.endswith(PARTIAL)):
        checkpoint = name.removesuffix(UNFINISHED)
        if checkpoint != name and not any(manifest_of(checkpoint, kind) in names for kind in (False, True)):
            for file in names:
                if file == checkpoint or file.startswith(f"{checkpoint}/"):
                    place.remove(file)
        place.remove(name)
    for name, manifest in read_manifests(place)[0].items():
        if manifest.batch > batch:
            path = manifest_of(name, manifest.sharded)
            place.rename(path, path + REPLACED)
            address = redact(place.address(name))
            log.warning("checkpoint %s is set aside: this run starts before it, at batch %d", address, batch)


def prune(place: Place, keep: int, batch: int) -> None:
    """Remove the oldest finished checkpoints, also of earlier launches, down to `keep`; the best one stays.

    The manifest goes last: what a kill leaves is the oldest still, and goes with the next. Broken ones of batches later
    than `batch`, the last one of this run, do not count as newer.
    """
    ours = {
        name: manifest
        for name, manifest in read_manifests(place)[0].items()
        if not manifest.metric and manifest.batch <= batch
    }
    for name in sorted(ours, key=lambda name: ours[name].progress, reverse=True)[keep:]:
        for path in (*files_of(name, ours[name]), manifest_of(name, ours[name].sharded)):
            place.remove(path)


def files_of(name: str, manifest: Manifest) -> dict[str, FileEntry]:
    """Return a checkpoint's files by their paths below the folder in which it has its name."""
    folder = name if manifest.sharded else str(PurePosixPath(name).parent)
    return {str(PurePosixPath(folder, file)): entry for file, entry in manifest.files.items()}


def best_metric(place: Place, name: str) -> dict[str, float]:
    """Return the metric by which a checkpoint was kept as the best; {} if it was never finished or is damaged."""
    try:
        manifest = read_manifest(place, name)
    except ValueError:
        return {}
    return {} if manifest is None else manifest.metric


def read_manifests(place: Place) -> tuple[dict[str, Manifest], dict[str, str]]:
    """Return a folder's manifests by checkpoint name, and why the other checkpoints have none."""
    names = place.names()
    manifests: dict[str, Manifest] = {}
    rejected = {found: "no manifest" for name in names if (found := _checkpoint_in(name)) is not None}
    finished = {f"{checkpoint_of(name)}{UNFINISHED}" for name in names}
    partial = {name for name in names if name.endswith(PARTIAL)} - finished
    rejected |= {name: "its run ended while it was being written" for name in partial}
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


def read_manifest(place: Place, name: str) -> Manifest | None:
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


def manifest_at(checkpoint: str) -> Manifest | None:
    """Return the manifest of the checkpoint of a path or address; None if it has none. A link is followed.

    Raises:
        ValueError: It cannot be read.
    """
    path = checkpoint.rstrip("/") if "://" in checkpoint else str(Path(checkpoint).resolve())
    folder, _, name = path.rpartition("/")
    return read_manifest(open_folder(folder), name)


def contents_sum(manifest: Manifest) -> str:
    """Return the SHA-256 of the sums of a checkpoint's files, by which an evaluation names it."""
    return _sha256({name: entry.sha256 for name, entry in manifest.files.items()})


def check(
    place: Place, name: str, manifest: Manifest, scratch: Path | None = None, names: Container[str] | None = None
) -> str | None:
    """Return why a checkpoint is not as its manifest says; None if it is. Sizes are compared before reading all.

    Of a store, an empty folder `scratch` then keeps what was downloaded, with the manifest. If `names` is given, of the
    manifest's files, only those are read.
    """
    files = files_of(name, manifest)
    for path, entry in files.items():
        size = place.size(path)
        if size != entry.size:
            return f"{path} is missing" if size is None else f"{path} has {size} bytes instead of {entry.size}"
    with TemporaryDirectory() if scratch is None else nullcontext(scratch) as folder:
        wanted = [path for path, file in zip(files, manifest.files, strict=True) if names is None or file in names]
        root = place.fetch(wanted, Path(folder))
        place_of_manifest = root / manifest_of(name, manifest.sharded)
        reason = verify(manifest, place_of_manifest.parent, names)
        if scratch is not None and reason is None:
            write_manifest(manifest, place_of_manifest)
        elif scratch is not None:
            shutil.rmtree(scratch)
            scratch.mkdir()
    return reason


def _checkpoint_in(name: str) -> str | None:
    """Return the checkpoint that a file belongs to, by its name."""
    path = PurePosixPath(name)
    if path.name.endswith(".distcp") or path.name == ".metadata":
        return str(path.parent)
    return name if path.suffix == ".pt" else checkpoint_of(name)


def _warn(address: str, reason: str) -> None:
    log.warning("checkpoint %s is skipped: %s", redact(address), reason)
