"""Random numbers as a pure function of where a sample stands, so that resuming or repartitioning changes nothing."""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """What the numbers are for; each purpose has its own."""

    TEACHERS = 0
    NOISE = 1


def random_words(seed: int, epoch: int, position: int, purpose: Purpose, count: int) -> NDArray[np.uint64]:
    """`count` uniform 64-bit words of one sample in one epoch.

    Counter-based (Philox4x64-10, Salmon et al. 2011), raw words only: numpy promises these to stay as they are.

    Args:
        seed: Of the run, not negative.
        epoch: From 0.
        position: Of the sample in the stored data set, from 0.
        purpose: Keeps two uses of the same sample apart.
        count: How many words.
    """
    counter = np.array([0, 0, int(purpose), position], dtype=np.uint64)
    return np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=counter).random_raw(count)


def noise_seed(seed: int, epoch: int, position: int) -> int:
    """The seed (63 bits) of a sample's denoising queries in one epoch."""
    return int(random_words(seed, epoch, position, Purpose.NOISE, 1)[0] >> np.uint64(1))
