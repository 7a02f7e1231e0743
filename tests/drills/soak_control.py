"""Share one small file, mapped by all, between the soak and the processes of its run."""

import mmap
import struct
from pathlib import Path

_SIZE = 64
_OFFSET, _ALLOWED, _BATCH = 0, 8, 16  # bytes; numbers of 8 bytes, two of `_BATCH`
FREE = 1 << 40  # more batches than any run has


class Control:
    """The clock's offset and how far the run may be, written by the soak; how far it is, written by rank 0."""

    def __init__(self, path: str | Path):
        with Path(path).open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE)

    @classmethod
    def make(cls, path: Path) -> "Control":
        """Make a new file: the clock is right, the run may not begin a batch yet."""
        path.write_bytes(bytes(_SIZE))
        made = cls(path)
        made.note_batch(-1, 0)
        return made

    @property
    def clock_offset(self) -> float:
        """Return the seconds that the clock is ahead."""
        return struct.unpack_from("d", self._map, _OFFSET)[0]

    @clock_offset.setter
    def clock_offset(self, seconds: float) -> None:
        struct.pack_into("d", self._map, _OFFSET, seconds)

    @property
    def allowed(self) -> int:
        """Return the batches that the run may finish by now, so that it lasts as long as the schedule."""
        return struct.unpack_from("q", self._map, _ALLOWED)[0]

    @allowed.setter
    def allowed(self, batches: int) -> None:
        struct.pack_into("q", self._map, _ALLOWED, batches)

    def batch(self, launch: int) -> int | None:
        """Return the batch that rank 0 of a launch has begun last, the first being 0; None: not that launch's."""
        number, batch = struct.unpack_from("qq", self._map, _BATCH)
        return batch if number == launch else None

    def note_batch(self, launch: int, batch: int) -> None:
        """Note the batch of a launch's rank 0. One whose launcher was killed may do so while the next one starts."""
        struct.pack_into("qq", self._map, _BATCH, launch, batch)
