"""Random numbers as a pure function of where a sample stands, so that resuming or repartitioning changes nothing.

A place is (seed, epoch, occurrence): the occurrence counts the samples of an epoch before they are shuffled. A sample
that a stream repeats within an epoch occurs several times, each with draws of its own.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_WORDS_PER_BLOCK = 4  # that Philox makes of one counter


class Purpose(IntEnum):
    """What the numbers are for; each purpose has its own."""

    TEACHERS = 0
    NOISE = 1


def random_words(
    seed: int, epoch: int, first: int, num_occurrences: int, purpose: Purpose, count: int
) -> NDArray[np.uint64]:
    """(num_occurrences, count) uniform 64-bit words: the row of an occurrence is the same in any range.

    Counter-based (Philox4x64-10, Salmon et al. 2011), raw words only: numpy promises these to stay as they are.

    Args:
        seed: Of the run, not negative.
        epoch: From 0.
        first: Occurrence of the first row, from 0.
        num_occurrences: How many rows.
        purpose: Keeps two uses of the same sample apart.
        count: How many words a row.
    """
    blocks = []
    for block in range(-(-count // _WORDS_PER_BLOCK)):
        counter = np.array([first, block, 0, int(purpose)], dtype=np.uint64)
        generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=counter)
        blocks.append(generator.random_raw(num_occurrences * _WORDS_PER_BLOCK).reshape(-1, _WORDS_PER_BLOCK))
    return np.concatenate(blocks, axis=1)[:, :count]


def noise_seed(seed: int, epoch: int, occurrence: int) -> int:
    """The seed (63 bits) of a sample's denoising queries at one of its occurrences."""
    return int(random_words(seed, epoch, occurrence, 1, Purpose.NOISE, 1)[0, 0] >> np.uint64(1))
