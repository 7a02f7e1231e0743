"""What the soak and the processes of its run share: one small file, mapped by all."""

import mmap
import struct
from pathlib import Path

_SIZE = 64
_OFFSET, _ALLOWED, _BATCH = 0, 8, 16  # bytes; numbers of 8 bytes, one of `_BATCH` for each rank
FREE = 1 << 40  # more batches than any run has


class Control:
    """The clock's offset and how far the run may be, written by the soak; how far each rank is, written by the rank."""

    def __init__(self, path: str | Path):
        with Path(path).open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE)

    @classmethod
    def make(cls, path: Path) -> "Control":
        """A new file: the clock is right, the run may not begin a batch yet."""
        path.write_bytes(bytes(_SIZE))
        return cls(path)

    @property
    def clock_offset(self) -> float:
        """Seconds that the clock is ahead."""
        return struct.unpack_from("d", self._map, _OFFSET)[0]

    @clock_offset.setter
    def clock_offset(self, seconds: float) -> None:
        struct.pack_into("d", self._map, _OFFSET, seconds)

    @property
    def allowed(self) -> int:
        """Batches that the run may finish by now, so that it lasts as long as the schedule."""
        return struct.unpack_from("q", self._map, _ALLOWED)[0]

    @allowed.setter
    def allowed(self, batches: int) -> None:
        struct.pack_into("q", self._map, _ALLOWED, batches)

    def batch(self, rank: int) -> int:
        """The batch that a rank has begun last; the first is 0."""
        return struct.unpack_from("q", self._map, _BATCH + 8 * rank)[0]

    def note_batch(self, rank: int, batch: int) -> None:
        """Of a rank."""
        struct.pack_into("q", self._map, _BATCH + 8 * rank, batch)
