"""Which teachers, solved examples, a sample is shown: a pure function of (seed, epoch, occurrence)."""

import hashlib
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from jaxtyping import Int64, UInt64

from recipe.config import TeacherConfig
from recipe.schema import Sample

_WORDS_PER_BLOCK = 4  # of Philox, per counter


class Purpose(IntEnum):
    """What random numbers are used for; each purpose has its own."""

    TEACHERS = 0
    NOISE = 1
    AUGMENTATION = 2
    TEACHER_AUGMENTATION = 3


def random_words(
    seed: int, epoch: int, first: int, num_occurrences: int, purpose: Purpose, count: int
) -> UInt64[np.ndarray, "{num_occurrences} {count}"]:
    """Return uniform 64-bit words; an occurrence's row does not depend on `first`.

    Counter-based (Philox4x64-10, Salmon et al. 2011) and raw: numpy guarantees that raw words never change.
    """
    blocks = []
    for block in range(-(-count // _WORDS_PER_BLOCK)):
        counter = np.array([first, block, 0, int(purpose)], dtype=np.uint64)
        generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=counter)
        blocks.append(generator.random_raw(num_occurrences * _WORDS_PER_BLOCK).reshape(-1, _WORDS_PER_BLOCK))
    return np.concatenate(blocks, axis=1)[:, :count]


def noise_seeds(seed: int, epoch: int, occurrence: int, num_images: int) -> list[int]:
    """Return the 63-bit seeds of the denoising queries of a sample's images at one of its occurrences."""
    words = random_words(seed, epoch, occurrence, 1, Purpose.NOISE, num_images)
    return (words[0] >> np.uint64(1)).tolist()


def id_hash(sample_id: str) -> int:
    """Return 63 bits that identify a sample among the teachers; much smaller to keep than ids."""
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "little") >> 1


def draw_distinct(words: UInt64[np.ndarray, "n k"], size: int) -> Int64[np.ndarray, "n k"]:
    """Return k distinct numbers below `size` in random order, from uniform words; k is at most `size`."""
    drawn = np.empty(words.shape, dtype=np.int64)
    for place in range(words.shape[1]):
        # The upper half of a 64-bit word times what is left: the bias is at most size / 2^32.
        number = ((words[:, place] >> np.uint64(32)) * np.uint64(size - place) >> np.uint64(32)).astype(np.int64)
        # The number-th of those not drawn yet: skip the drawn ones, smallest first.
        for taken in np.sort(drawn[:, :place], axis=1).T:
            number += number >= taken
        drawn[:, place] = number
    return drawn


class TeacherPool:
    """The teachers, held in memory, and the rule by which they are drawn."""

    def __init__(self, samples: Sequence[Sample], config: TeacherConfig, seed: int):
        """Keep the pool; raise ValueError if it has too few teachers, or one that is not an annotated image."""
        if len(samples) <= config.num_teachers:
            raise ValueError(
                f"the teacher pool holds {len(samples)} samples, but teachers.num_teachers {config.num_teachers} needs "
                f"at least {config.num_teachers + 1}, as a sample is never its own teacher: choose a larger pool"
            )
        unusable = [item.id for item in samples if item.objects is None or not item.image or item.further]
        if unusable:
            raise ValueError(
                f"the teacher pool has samples that are not one annotated image, {unusable[:5]}: choose it again"
            )
        self.samples, self.config, self.seed = samples, config, seed
        self.id_hashes = np.array([id_hash(sample.id) for sample in samples], dtype=np.int64)

    def draw(self, epoch: int, first: int, id_hashes: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, "n num_teachers"]:
        """Draw the teachers of n occurrences from `first` on, given the `id_hash` of the samples that occur.

        A sample is never its own teacher: one spare is drawn for that.

        Returns:
            Positions in the pool; a share of `1 - teacher_ratio` is shown none: -1.
        """
        count = self.config.num_teachers
        words = random_words(self.seed, epoch, first, len(id_hashes), Purpose.TEACHERS, count + 2)
        drawn = draw_distinct(words[:, 1:], len(self.samples))
        is_itself = self.id_hashes[drawn] == id_hashes[:, None]
        drawn = np.take_along_axis(drawn, np.argsort(is_itself, axis=1, kind="stable"), axis=1)[:, :count]
        shown = (words[:, 0] >> np.uint64(11)) < self.config.teacher_ratio * 2**53
        return np.where(shown[:, None], drawn, -1)

    def digest(self) -> str:
        """Return 16 hex digits that identify the pool and how it is drawn."""
        drawing = f"{self.config.num_teachers} {self.config.teacher_ratio} {self.seed}"
        return hashlib.sha256(self.id_hashes.tobytes() + drawing.encode()).hexdigest()[:16]

    def draw_samples(self, epoch: int, occurrence: int, sample_id: str) -> list[Sample]:
        """Return the teachers of one occurrence of a sample, in order."""
        (row,) = self.draw(epoch, occurrence, np.array([id_hash(sample_id)], dtype=np.int64))
        return [self.samples[index] for index in row if index >= 0]
