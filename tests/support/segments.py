"""Keep the shared memory of processes that run at the same time apart."""

import os
from collections.abc import Iterator

from streaming.base.shared import prefix

NUM_RANGES, PER_PROCESS = 1000, 1000  # names have six digits


def number_segments_apart(place: int | None = None) -> None:
    """Begin Streaming's numbers at a `place`, by default this process's id; what it forks later shares it.

    Streaming takes the first number that is free. Two processes that look at the same time take the same one, and the
    second ends with FileExistsError.
    """
    first = PER_PROCESS * ((os.getpid() if place is None else place) % NUM_RANGES)

    def numbers() -> Iterator[int]:
        yield from range(first, first + PER_PROCESS)

    prefix._each_prefix_int = numbers
