"""Write the training state to files on all ranks: either every rank has written, or all raise why not."""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from composer.core import State
from composer.utils import RemoteUploader, dist, reproducibility
from composer.utils.checkpoint import glob_filter
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from recipe.checkpoints.check import FileEntry, describe_file
from recipe.optim.groups import local
from recipe.records import replacing
from recipe.redact import redact_text
from recipe.upstream.composer_state import weights_only_state
from recipe.upstream.torch_private import tree_leaves

Value = TypeVar("Value")
IgnoreKeys = list[str] | Callable[[dict[str, Any]], None]


class WriteError(OSError):
    """Report on every rank that a checkpoint could not be written."""


def together(action: Callable[[], Value]) -> Value:
    """Run an action on every rank and wait for all; raise WriteError on every rank if it failed on one."""
    result, problem = None, None
    try:
        result = action()
    except (OSError, RuntimeError, CheckpointException) as error:
        problem = f"rank {dist.get_global_rank()}: {_brief(error)}"
    problems = [text for text in dist.all_gather_object(problem) if text]
    if problems:
        raise WriteError("; ".join(problems))
    return result  # pyright: ignore[reportReturnType]


def state_of_training(state: State, weights_only: bool, ignore_keys: IgnoreKeys | None) -> dict[str, Any]:
    """Return what Composer puts into a checkpoint, without `ignore_keys`; called by all ranks."""
    content: dict[str, Any] = {"state": weights_only_state(state) if weights_only else state.state_dict()}
    if not weights_only:
        rng = reproducibility.get_rng_state()  # of all ranks
        if not (state.fsdp_sharded_state_dict_enabled and dist.get_global_rank() > 0):
            content["rng"] = rng
    if ignore_keys:
        (ignore_keys if callable(ignore_keys) else glob_filter(ignore_keys))(content)
        content.setdefault("state", {})
    return content


def num_bytes(content: Mapping[str, Any]) -> int:
    """Return the bytes of this rank's tensors, counting shared memory once."""
    tensors = [local(leaf) for leaf in tree_leaves(content) if isinstance(leaf, Tensor)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


class HashingFile:
    """Pass what `torch.save` writes to a file, and keep the checksum of all that should have reached the disk."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        """Write, and keep the disk's error: torch only reports an unexpected position."""
        try:
            self.file.write(content)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(content)
        self.size += len(content)
        return len(content)

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()


def write_file(content: Mapping[str, Any], path: Path) -> dict[str, FileEntry]:
    """Write a checkpoint of one file under another name, flush it to disk, then rename it.

    Raises:
        OSError: The disk is full or broken; the partial file is removed.
    """
    try:
        with replacing(path) as partial:
            with partial.open("wb") as file:
                hashing = HashingFile(file)
                try:
                    torch.save(content, hashing)  # pyright: ignore[reportArgumentType]
                except RuntimeError as error:
                    raise hashing.error or error from error
                file.flush()
                os.fsync(file.fileno())
            if partial.stat().st_size != hashing.size:
                raise OSError(f"{path} got {partial.stat().st_size} of {hashing.size} bytes")
    except (OSError, RuntimeError) as error:
        raise _with_space(error, path.parent) from error
    return {path.name: FileEntry(hashing.size, hashing.sha256.hexdigest())}


def write_shards(content: dict[str, Any], folder: Path, planner: Any) -> dict[str, FileEntry]:
    """Write this rank's part of a sharded checkpoint and return its files; called by all ranks, OSError on all.

    A shard is hashed as read back, since torch writes it by itself.
    """
    planner = planner or DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    try:
        save(state_dict=content, storage_writer=FileSystemWriter(folder), planner=planner)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise _with_space(error, folder.parent) from error
    names = [path.name for path in folder.glob(f"__{dist.get_global_rank()}_*.distcp")]
    if dist.get_global_rank() == 0:
        names.append(".metadata")
    return {name: describe_file(folder / name) for name in names}


def failed_uploads(uploader: RemoteUploader | None, wait: bool) -> list[str]:
    """Return why uploads of this rank failed, each once; with `wait`, of all that were started."""
    if uploader is None:
        return []
    ended = [future for future in uploader.futures if wait or future.done()]
    errors = [error for future in ended if (error := future.exception()) is not None]
    uploader.futures = [future for future in uploader.futures if future not in ended]
    return [redact_text(f"{type(error).__name__}: {error}") for error in errors]


def link(source: Path, target: Path) -> None:
    """Replace `target` at once by a hard link to `source`, or by a copy if the disk has no hard links."""
    with replacing(target) as new:
        try:
            new.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, new)


def _with_space(error: BaseException, folder: Path) -> OSError:
    return OSError(f"{_brief(error)} ({folder} has {shutil.disk_usage(folder).free} bytes free)")


def _brief(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return "; ".join(_brief(failure) for failure, _ in error.failures.values())
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
