"""Compare our head with its peers on sets of real images, each for the same CPU time: list the jobs and run them."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs import Job, Store, is_ours
from our_head import train_ours
from peer_detr import PEERS, train_and_judge
from real_sets import (
    CHOICE_SEED,
    SetError,
    augmentation_of,
    batch_size,
    fingerprint,
    image_spec_of,
    pixel_budget,
    read_set,
    shrink,
    split_set,
)
from recipe.schema import Sample

MODELS = ("ours", *PEERS)
RATES = (1.0, 0.4, 2.5)  # factors on the learning rates of everybody; of equally good ones the first is chosen
CHOICE_SHARE = 1 / 3  # of the CPU time, for each candidate


@dataclass(frozen=True)
class RealSet:
    """A set of real images; raises SetError if it is not one."""

    folder: Path

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self.folder.resolve().name

    @cached_property
    def samples(self) -> list[Sample]:
        """Read the images; print what is left out."""
        samples, left_out = read_set(self.folder)
        for what, count in left_out.items():
            print(f"{self.name}: {count} x {what}")
        if len(samples) < 10:
            raise SetError(f"{self.folder} has {len(samples)} usable images: give a set of at least 10")
        return samples

    @cached_property
    def pixels(self) -> int:
        """Return the pixel budget, which only training images of the test decide."""
        return pixel_budget(split_set(self.samples, "test")[0])

    @cached_property
    def data(self) -> str:
        """Return what identifies its content."""
        return fingerprint(self.folder)


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where results are kept.

    Attributes:
        sets: The sets.
        tasks, models, seeds: Names of `TASKS` and `MODELS`, and seeds of training.
        cpu_seconds: Of each training.
        steps: Of each training instead, for ours alone.
        changes: By the name of a variant of ours, which is then one of `models`: what it changes in the yaml.
        augment: One of `AUGMENTS`.
        store: Of results.
        scratch: Folder for the files of a running job.
    """

    sets: Sequence[RealSet]
    tasks: Sequence[str]
    models: Sequence[str]
    seeds: Sequence[int]
    cpu_seconds: float
    augment: str
    store: Store
    scratch: Path
    steps: int | None = None
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])

    def job(self, real_set: RealSet, task: str, model: str, seed: int, rate: float, part: str = "test") -> Job:
        """Return a job of this comparison."""
        augment, share = augmentation_of(self.augment, real_set.pixels)
        settings = {
            "data": real_set.data,
            "pixels": real_set.pixels,
            "batch_size": batch_size(real_set.pixels * share),
            "cpu_seconds": self.cpu_seconds * (CHOICE_SHARE if part == "choice" else 1),
            "augment": augment,
            "share": share,
        }
        if self.steps is not None:
            settings["steps"] = self.steps
        if model in self.changes:
            settings["changes"] = dict(self.changes[model])
        return Job(real_set.name, task, model, seed, part, rate, settings)

    def run(self, real_set: RealSet, job: Job) -> dict[str, Any]:
        """Return the stored result of a job; train if there is none."""
        row = self.store.find(job)
        if row is None:
            self.scratch.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="job-", dir=self.scratch) as folder:
                result = train_model(job, real_set, Path(folder))
            row = self.store.write(job, result)
            print(f"{job.name}: {_in_words(result)}", flush=True)
        return row

    def choices(self, real_set: RealSet, task: str, model: str) -> list[Job]:
        """Return the jobs that decide a learning rate, one per candidate."""
        return [self.job(real_set, task, model, CHOICE_SEED, rate, "choice") for rate in RATES]

    def rate(self, real_set: RealSet, task: str, model: str) -> float | None:
        """Return the chosen factor on learning rates; None if its jobs were not all run. A variant takes ours."""
        if model in self.changes:
            return self.rate(real_set, task, "ours")
        scores: dict[float, float] = {}
        for job in self.choices(real_set, task, model):
            row = self.store.find(job)
            if row is None:
                return None
            scores[job.rate] = row["result"]["ap50"] or 0.0
        return max(scores, key=lambda rate: scores[rate])

    def all_choices(self) -> Iterator[tuple[RealSet, Job]]:
        """Yield the jobs of all choices."""
        for real_set in self.sets:
            for task in self.tasks:
                for model in self.models:
                    if model in self.changes:
                        continue
                    yield from ((real_set, job) for job in self.choices(real_set, task, model))

    def all_jobs(self) -> Iterator[tuple[RealSet, Job, bool]]:
        """Yield the jobs, seed by seed, and whether the rate was chosen; without a choice it is the default."""
        rates = {
            (real_set.name, task, model): self.rate(real_set, task, model)
            for real_set in self.sets
            for task in self.tasks
            for model in self.models
        }
        for seed in self.seeds:
            for real_set in self.sets:
                for task in self.tasks:
                    for model in self.models:
                        rate = rates[real_set.name, task, model]
                        job = self.job(real_set, task, model, seed, RATES[0] if rate is None else rate)
                        yield real_set, job, rate is not None


def train_model(job: Job, real_set: RealSet, folder: Path) -> dict[str, Any]:
    """Train one model on what the job says, with files in an empty folder; return its scores, steps and CPU seconds."""
    train, held_out = split_set(real_set.samples, job.part)
    share = job.settings["share"]
    spec = image_spec_of(train, real_set.pixels, share)
    if share < 1:
        train = [shrink(sample, spec) for sample in train]
    if is_ours(job.model):
        return train_ours(job, train, held_out, spec, folder)
    return train_and_judge(job, train, held_out, spec)


def _in_words(result: dict[str, Any]) -> str:
    return f"AP50 {result['ap50']}, {result['cpu_s']:.0f} CPU s, {result['steps']} steps"
