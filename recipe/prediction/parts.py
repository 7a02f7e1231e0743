"""A prediction in parts: processes share them, and the same command started again makes only the others.

The images are cut into parts of a fixed number; part p belongs to process p % world size, whatever is done already, so
that processes agree on nothing but the start. A part's file is written last, after its drawings: a part that was killed
is made again. Parts are whole batches, so the results are those of one process without parts, to the last bit.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] - public, but not in __all__

from recipe.prediction.files import PredictedFile, write_json_text

log = logging.getLogger(__name__)

PARTS_FOLDER = "parts"  # within the folder of the results, until they are complete
BATCHES_PER_PART = 8
_PLAN_FILE = "plan.json"
_POLL_SECONDS = 0.2
_SECONDS_BETWEEN_MESSAGES = 60.0
_PATIENCE = timedelta(minutes=10)  # with processes that start late


@dataclass(frozen=True)
class Parts:
    """The parts of one command.

    Attributes:
        folder: Of the parts' files.
        num_images: Of all processes.
        size: Images of a part.
        rank: Of this process.
        world_size: Processes.
    """

    folder: Path
    num_images: int
    size: int
    rank: int
    world_size: int

    @property
    def _files(self) -> list[Path]:
        return [self.folder / f"{number:06}.json" for number in range(-(-self.num_images // self.size))]

    def to_do(self) -> list[slice]:
        """Return the images of each part of this process that is not done."""
        own = enumerate(self._files)
        return [
            slice(number * self.size, (number + 1) * self.size)
            for number, path in own
            if number % self.world_size == self.rank and not path.exists()
        ]

    def write(self, images: slice, entries: Sequence[PredictedFile]) -> None:
        """Keep a part's results; raise ValueError if they cannot be written."""
        path = self._files[images.start // self.size]
        rows = [entry.to_json() for entry in entries]
        write_json_text(path, json.dumps(rows, ensure_ascii=False))

    def read_all(self) -> list[PredictedFile]:
        """Return the results of all processes, in order; wait for those that are not done."""
        began = said = time.monotonic()
        while missing := [path for path in self._files if not path.exists()]:
            if time.monotonic() - said > _SECONDS_BETWEEN_MESSAGES:
                said = time.monotonic()
                log.info("waiting since %.0f s for %d parts of other processes", said - began, len(missing))
            time.sleep(_POLL_SECONDS)
        return [PredictedFile.from_json(row) for path in self._files for row in json.loads(path.read_text("utf-8"))]

    def remove(self) -> None:
        """Remove the parts, whose results are elsewhere now."""
        shutil.rmtree(self.folder, ignore_errors=True)


def open_parts(
    out: Path, depends: Mapping[str, str], names: Sequence[str], size: int, overwrite: bool, rank: int, world_size: int
) -> Parts:
    """Return the parts of a command, those of an unfinished one before it if it was the same.

    All processes must call it. None continues before all have, so that the first one's results are not taken for those
    of an earlier command by one that starts late.

    Args:
        out: Folder of the results; it exists.
        depends: All that the results depend on but the images, by the name that an error gives it.
        names: Of the images, in order.
        size: Images of a part.
        overwrite: Remove the parts of another command, instead of raising.
        rank: Of this process.
        world_size: Processes.

    Raises:
        ValueError: The parts are of another command.
    """
    folder = out / PARTS_FOLDER
    images = f"{len(names)}, {hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]}"
    plan = {**depends, "images": images, "images of a part": str(size)}
    if world_size == 1:
        _begin(folder, plan, overwrite)
        return Parts(folder, len(names), size, rank, world_size)
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    meeting = TCPStore(*address, world_size, is_master=rank == 0, timeout=_PATIENCE)  # waits for all
    if rank == 0:
        _begin(folder, plan, overwrite)
        meeting.set(_PLAN_FILE, "")
    meeting.wait([_PLAN_FILE])
    if (found := _read_plan(folder)) != plan:
        raise ValueError(
            f"{folder / _PLAN_FILE} of the first process differs ({', '.join(_changed(plan, found or {}))}): is --out "
            "shared by all machines, and do all see the same images and checkpoint?"
        )
    return Parts(folder, len(names), size, rank, world_size)


def _begin(folder: Path, plan: Mapping[str, str], overwrite: bool) -> None:
    """Make the folder of the parts unless it is there; raise ValueError if it is of another plan."""
    found = _read_plan(folder)
    if found == plan:
        return
    if found is not None and not overwrite:
        raise ValueError(
            f"{folder} holds parts of another command ({', '.join(_changed(plan, found))} changed): "
            "undo the change to continue it, or give --overwrite or another --out"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_json_text(folder / _PLAN_FILE, json.dumps(plan, indent=1))


def _changed(plan: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    return [name for name in plan if plan[name] != found.get(name)]


def _read_plan(folder: Path) -> dict[str, str] | None:
    try:
        return json.loads((folder / _PLAN_FILE).read_text("utf-8"))
    except FileNotFoundError:
        return None


def identity_of(checkpoint: str) -> str:
    """Return what changes if a checkpoint is written again: its files' times and sizes."""
    path = Path(checkpoint)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    known = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return f"{checkpoint} {hashlib.sha256(repr(known).encode()).hexdigest()[:16]}"


def place_in_world() -> tuple[int, int, int]:
    """Return (rank, local rank, world size) that the launcher gave this process."""
    rank, local_rank, world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    return rank, local_rank, world_size


def batches_of(images: slice, size: int, num_images: int) -> Iterator[slice]:
    """Yield the batches of some images."""
    stop = min(images.stop, num_images)
    yield from (slice(start, min(start + size, stop)) for start in range(images.start, stop, size))
