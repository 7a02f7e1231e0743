"""What the head reads of a trunk that never learns, computed once and read from disk from the second epoch on.

A file per image, named by all that its content depends on: the base model's weights, the precision of the computation,
the pixels and the prompt. Rank, pack and run have no part in it. Files appear whole, as they are written under another
name first, so a killed run leaves none that is half written, and ranks may share the folder or not.
"""

import hashlib
import logging
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger(__name__)

SUFFIX, PART = ".safetensors", ".part"
_SECONDS_OF_A_PART = 3600  # older ones belong to no run that writes


@dataclass(frozen=True)
class TrunkReading:
    """What the memory reads of one image and its prompt, in the trunk's dtype.

    Attributes:
        vision: (tokens, D), after the merger, raster order.
        prompt: (S, D), the last hidden states of the prompt.
        patches: (tokens, merge², C), before the merger; None if the memory does not read them.
    """

    vision: Tensor
    prompt: Tensor
    patches: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, without None."""
        return {name: value for name, value in vars(self).items() if value is not None}


class FrozenCache:
    """A folder of `TrunkReading`s.

    Args:
        folder: Made if missing.
        base: Identifies all that the images have in common: the trunk's weights, and how it computes.
        room: Bytes that this rank may write.
    """

    def __init__(self, folder: Path, base: str, room: int):
        self.folder = folder
        self.base = base
        self.room = room
        self.num_read = self.num_computed = 0  # microbatches
        self._is_full = False

    def path(self, content: str) -> Path:
        """Return the file of an image and its prompt, which `content` identifies."""
        key = hashlib.sha256(f"{self.base} {content}".encode()).hexdigest()
        return self.folder / key[:2] / (key[2:] + SUFFIX)

    def has(self, contents: Sequence[str]) -> bool:
        """Return whether all images of a microbatch are there."""
        return all(self.path(content).is_file() for content in contents)

    def read(self, contents: Sequence[str], device: torch.device) -> list[TrunkReading] | None:
        """Return the readings of a microbatch with the bits that were written; None if any is missing or damaged."""
        readings: list[TrunkReading] = []
        for content in contents:
            path = self.path(content)
            try:
                tensors = load_file(path)
            except FileNotFoundError:
                break
            except (OSError, SafetensorError) as error:
                log.warning("%s cannot be read (%s): computing it again", path, error)
                path.unlink(missing_ok=True)
                break
            readings.append(TrunkReading(**{name: value.to(device) for name, value in tensors.items()}))
        is_whole = len(readings) == len(contents)
        self.num_read += is_whole
        self.num_computed += not is_whole
        return readings if is_whole else None

    def write(self, contents: Sequence[str], readings: Sequence[TrunkReading]) -> None:
        """Keep the readings that are not there yet, while there is room; training never waits for space."""
        for content, reading in zip(contents, readings, strict=True):
            path = self.path(content)
            if self._is_full or path.is_file():
                continue
            tensors = {name: value.detach().cpu().contiguous() for name, value in reading.tensors().items()}
            size = sum(value.nbytes for value in tensors.values())
            if not all(bool(value.isfinite().all()) for value in tensors.values()):
                continue  # the guard rejects the batch
            if size > self.room:
                self._stop("the room for it is used up: raise cache_frozen.size_limit")
                continue
            part = path.with_name(f"{uuid.uuid4().hex}{PART}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(tensors, part)
                part.replace(path)
            except (OSError, SafetensorError) as error:
                part.unlink(missing_ok=True)
                self._stop(f"it cannot be written ({error}): free disk space")
                continue
            self.room -= size

    def _stop(self, why: str) -> None:
        self._is_full = True
        log.warning(
            "cache_frozen.local %s takes no more images, %s; microbatches with an image that is not there are "
            "computed in every epoch",
            self.folder,
            why,
        )


def bytes_of(folder: Path) -> int:
    """Return the size of all files of a cache, and remove parts that a killed run has left."""
    total = 0
    for entry in folder.glob(f"*/*{SUFFIX}"):
        total += entry.stat().st_size
    for part in folder.glob(f"*/*{PART}"):
        try:
            if time.time() - part.stat().st_mtime > _SECONDS_OF_A_PART:
                part.unlink()
        except FileNotFoundError:  # another rank removed or renamed it
            pass
    return total


def free_bytes(folder: Path) -> int:
    """Return the free space of the folder's disk."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
