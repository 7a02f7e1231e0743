"""Our head and its peers on sets of real images, each for the same CPU time: what one job does."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from convert.write import write_split
from jobs import Job, Store
from our_head import YAML, train_head
from peer_detr import LEARNING_RATE, PEERS, Budget, View, build_peer, evaluate_peer, train_peer
from real_sets import (
    CHOICE_SEED,
    REAL,
    SetError,
    batch_size,
    fingerprint,
    pixel_budget,
    pixel_statistics,
    read_set,
    split_set,
)
from recipe.config import AugmentConfig, CropConfig
from recipe.data.words import Vocabulary
from recipe.schema import ImageSpec, Sample
from recipe.tiny import build_tiny_checkpoint

MODELS = ("ours", *PEERS)
# What our head learns besides boxes; the peers learn captions as classes.
TASKS: dict[str, dict[str, Any]] = {
    "captions": {"loss.weight_caption": 4.0, "caption_decoder.max_caption_tokens": "null"},
    "boxes": {},
}
# The section train_loader.augment, of ours and of the peers.
AUGMENTS: dict[str, AugmentConfig | None] = {
    "none": None,
    "flip": AugmentConfig(horizontal_flip=0.5),
    "crop": AugmentConfig(horizontal_flip=0.5, crop=CropConfig()),
}
AUGMENT_YAML = {"none": "null", "flip": "{horizontal_flip: 0.5}", "crop": "{horizontal_flip: 0.5, crop: {}}"}
RATES = (1.0, 0.4, 2.5)  # factors on the learning rates of everybody; of equally good ones the first is chosen
CHOICE_SHARE = 1 / 3  # of the CPU time, for each candidate
PROBE_STEPS = 12
SCORES = {"ap50": "box_ap50", "ap": "box_ap", "ap_small": "box_ap_small"}
UNDEFINED = -1.0


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
        augment: Name of `AUGMENTS`.
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

    def job(self, real_set: RealSet, task: str, model: str, seed: int, rate: float, part: str = "test") -> Job:
        """Return a job of this comparison."""
        settings = {
            "data": real_set.data,
            "pixels": real_set.pixels,
            "batch_size": batch_size(real_set.pixels),
            "cpu_seconds": self.cpu_seconds * (CHOICE_SHARE if part == "choice" else 1),
            "augment": self.augment,
        }
        return Job(real_set.name, task, model, seed, part, rate, settings)

    def run(self, real_set: RealSet, job: Job) -> dict[str, Any]:
        """Return the stored result of a job; train if there is none."""
        row = self.store.find(job)
        if row is None:
            self.scratch.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="job-", dir=self.scratch) as folder:
                train = _train_ours if job.model == "ours" else _train_peer
                result = train(job, *split_set(real_set.samples, job.part), Path(folder))
            row = self.store.write(job, result)
            print(f"{job.name}: {_told(result)}", flush=True)
        return row

    def choices(self, real_set: RealSet, task: str, model: str) -> list[Job]:
        """Return the jobs that decide a learning rate, one per candidate."""
        return [self.job(real_set, task, model, CHOICE_SEED, rate, "choice") for rate in RATES]

    def rate(self, real_set: RealSet, task: str, model: str) -> float | None:
        """Return the chosen factor on learning rates; None if its jobs were not all run."""
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


def image_spec_of(train: Sequence[Sample], pixels: int) -> ImageSpec:
    """Return the resize rule and the normalisation of the training images, for everybody."""
    mean, std = pixel_statistics(train)
    return ImageSpec(
        patch_size=14,
        merge_size=2,
        min_pixels=REAL["image.min_pixels"],
        max_pixels=pixels,
        image_mean=tuple(mean),
        image_std=tuple(std),
    )


def learning_rates(rate: float) -> dict[str, float]:
    """Return all of our learning rates, those of the yaml times a factor."""
    section = yaml.safe_load(YAML.read_text(encoding="utf-8"))["optimizer"]
    return {f"optimizer.{name}": value * rate for name, value in section.items() if name.startswith("lr_")}


def _train_ours(job: Job, train: Sequence[Sample], held_out: Sequence[Sample], folder: Path) -> dict[str, Any]:
    """Train the recipe's head for as many steps as a probe says that the CPU time allows."""
    pixels, size = job.settings["pixels"], job.settings["batch_size"]
    spec, data = image_spec_of(train, pixels), folder / "data"
    tiny = str(folder / "tiny")
    build_tiny_checkpoint(tiny, seed=job.seed, image_mean=spec.image_mean, image_std=spec.image_std)
    for split, rows in {"train": train, "val": held_out}.items():
        write_split(rows, str(data), split)
    changes = {
        "model.pretrained_model_name_or_path": tiny,
        **REAL,
        **TASKS[job.task],
        **learning_rates(job.rate),
        "image.max_pixels": pixels,
        "train_loader.global_batch_size": size,
        "eval_loader.global_batch_size": size,
        "train_loader.augment": AUGMENT_YAML[job.settings["augment"]],
    }
    short = {**changes, "trainer.eval_subset_num_batches": 1, "scheduler.t_warmup": "0ba"}
    probe = train_head(short, data, folder / "probe", PROBE_STEPS, PROBE_STEPS, job.seed)
    steps = max(1, int(job.settings["cpu_seconds"] / probe.step_seconds()))
    changes["scheduler.t_warmup"] = f"{min(50, steps // 8)}ba"
    curve = train_head(changes, data, folder / "run", steps, steps, job.seed)
    return _result(curve.scores, steps, curve.spent)


def _train_peer(job: Job, train: Sequence[Sample], held_out: Sequence[Sample], folder: Path) -> dict[str, Any]:
    """Train a peer until its CPU time is over."""
    torch.manual_seed(job.seed)
    augment = AUGMENTS[job.settings["augment"]]
    spec = image_spec_of(train, job.settings["pixels"])
    view = View.of(job.model, [*train, *held_out], spec, augment, job.seed)
    names = class_names([*train, *held_out], augment) if job.task == "captions" else []
    num_queries = REAL["detection_head.num_queries"]
    peer = build_peer(job.model, max(len(names), 1), num_queries, width=128, num_layers=2, num_heads=4)
    budget = Budget(job.settings["cpu_seconds"], job.settings["batch_size"], LEARNING_RATE * job.rate)
    steps, spent = train_peer(peer, train, view, budget, job.seed, names)
    return _result(evaluate_peer(peer, held_out, view), steps, spent)


def class_names(samples: Sequence[Sample], augment: AugmentConfig | None) -> list[str]:
    """Return the captions of all objects; if images may be flipped, also what they then are, such as a right arm."""
    names = {item.caption for sample in samples for item in sample.objects or () if not item.iscrowd}
    if augment is not None and augment.horizontal_flip:
        vocabulary = Vocabulary(augment.languages, augment.words)
        names |= {vocabulary.mirrored(name) or name for name in names}
    return sorted(names)


def _result(scores: dict[str, float], steps: int, seconds: float) -> dict[str, Any]:
    values = {name: scores[key] for name, key in SCORES.items()}
    rounded = {name: None if value == UNDEFINED else round(value, 4) for name, value in values.items()}
    return {**rounded, "steps": steps, "cpu_s": round(seconds, 1)}


def _told(result: dict[str, Any]) -> str:
    return f"AP50 {result['ap50']}, {result['cpu_s']:.0f} CPU s, {result['steps']} steps"
