"""Row → Example: what one occurrence of a sample in an epoch is."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from recipe.data.augment import Augmentation, Drawn
from recipe.data.encode import Encoder, naming
from recipe.data.lengths import takes_teachers
from recipe.data.teachers import TeacherPool, noise_seeds
from recipe.schema import Example, Sample


@dataclass(frozen=True)
class ExampleMaker:
    """Row → Example, with the teachers, the noise and the look of its occurrence in an epoch."""

    encoder: Encoder
    teachers: TeacherPool | None
    seed: int
    augmentation: Augmentation | None = None  # None: every occurrence shows the image as it is

    def __call__(self, row: Mapping[str, Any], epoch: int, occurrence: int, with_answers: bool = True) -> Example:
        """Encode a row; raise ValueError with its id and the remedy if it cannot be used."""
        sample, teachers, drawn = self.shown(row, epoch, occurrence)
        example = self.encoder(sample, teachers, with_answers, drawn)
        look = drawn[-1].describe() if drawn and drawn[-1] is not None else ""
        seeds = noise_seeds(self.seed, epoch, occurrence, len(sample.per_image()))
        return replace(example, noise_seeds=[seeds[image] for image in example.student_images], drawn=look)

    def shown(
        self, row: Mapping[str, Any], epoch: int, occurrence: int
    ) -> tuple[Sample, list[Sample], list[Drawn | None]]:
        """Return a row's sample and its teachers as an occurrence shows them, and how; no list without augmentation."""
        sample = Sample.from_mds(row)
        teachers = []
        if self.teachers is not None and takes_teachers(sample):
            teachers = self.teachers.draw_samples(epoch, occurrence, sample.id)
        if self.augmentation is None:
            return sample, teachers, []
        with naming(sample):
            return self.augmentation.show(sample, teachers, epoch, occurrence)


def make_inert(example: Example) -> Example:
    """Return the same images and tokens with nothing to learn or score: it keeps ranks in step and is not counted."""
    sample = example.sample
    further = tuple(replace(item, objects=None) for item in sample.further)
    return replace(
        example,
        sample=replace(sample, objects=None, messages=None, further=further),
        roles=torch.zeros_like(example.roles),
        targets=[None for _ in example.targets],
        is_inert=True,
    )
