"""Keep the shared memory of parallel test workers apart."""

import os
from collections.abc import Iterator

from streaming.base.shared import prefix

PER_WORKER = 100_000  # names have six digits


def number_segments_apart() -> None:
    """Begin Streaming's numbers at this pytest-xdist worker's own.

    Streaming takes the first number that is free; two processes that look at the same time take the same one, and the
    second ends with FileExistsError.
    """
    first = PER_WORKER * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))

    def numbers() -> Iterator[int]:
        yield from range(first, first + PER_WORKER)

    prefix._each_prefix_int = numbers
