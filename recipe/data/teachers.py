"""Which solved examples a sample is shown: a pure function of (seed, epoch, sample position)."""

from collections.abc import Sequence

import numpy as np

from recipe.config import TeacherConfig
from recipe.data.draws import Purpose, random_words
from recipe.schema import Sample


def draw_teachers(
    seed: int, epoch: int, position: int, pool_size: int, num_teachers: int, teacher_ratio: float
) -> list[int]:
    """Distinct indices into the pool, uniform over it; none for a share of `1 - teacher_ratio` of the samples.

    Args:
        seed: Of the run.
        epoch: From 0.
        position: Of the sample in the stored data set.
        pool_size: Teachers to choose from.
        num_teachers: How many; at most `pool_size`.
        teacher_ratio: Share of the samples that get teachers, in [0, 1].
    """
    chance, *keys = random_words(seed, epoch, position, Purpose.TEACHERS, 1 + pool_size)
    if int(chance) >> 11 >= teacher_ratio * 2**53:
        return []
    return np.argsort(np.array(keys), kind="stable")[:num_teachers].tolist()


class TeacherPool:
    """The pool, held in memory, and how it is drawn from."""

    def __init__(self, samples: Sequence[Sample], config: TeacherConfig, seed: int):
        """Checks that the pool can serve every sample.

        Args:
            samples: The pool, in stored order.
            config: How many teachers, and how often.
            seed: Of the run.

        Raises:
            ValueError: Too few teachers, or one that is not an annotated picture.
        """
        if len(samples) <= config.num_teachers:
            raise ValueError(
                f"the teacher pool holds {len(samples)} samples, but teachers.num_teachers {config.num_teachers} needs "
                f"at least {config.num_teachers + 1}, as a sample is never its own teacher: choose a larger pool"
            )
        unusable = [sample.id for sample in samples if sample.objects is None or not sample.image]
        if unusable:
            raise ValueError(f"the teacher pool holds samples that are no annotated pictures: {unusable[:5]}")
        self.samples = samples
        self.config = config
        self.seed = seed

    def draw(self, epoch: int, position: int, sample_id: str) -> list[Sample]:
        """The teachers of the sample at `position`, never itself: one spare is drawn for that."""
        drawn = draw_teachers(
            self.seed,
            epoch,
            position,
            len(self.samples),
            self.config.num_teachers + 1,
            self.config.teacher_ratio,
        )
        others = [self.samples[index] for index in drawn if self.samples[index].id != sample_id]
        return others[: self.config.num_teachers]
