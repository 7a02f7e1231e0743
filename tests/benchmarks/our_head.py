"""Train the head by its yaml and overrides, and watch it: the recipe's side of the convergence benchmark."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from composer import Callback, Logger, State

from convert.write import write_split
from jobs import Job
from real_sets import REAL, TASKS, YAML, batch_size, result_of
from recipe.callbacks import table
from recipe.configure import load_config
from recipe.schema import ImageSpec, Sample
from recipe.tiny import build_tiny_checkpoint
from recipe.train import main as train_by_config

PROBE_STEPS = 30
WARMUP_STEPS = 6  # of a probe, not measured


class Curve(Callback):
    """The scores of every evaluation, and the CPU time of training: from the first batch on, without evaluations."""

    def __init__(self):
        self.points: list[tuple[int, float, float]] = []  # steps, AP50, CPU seconds
        self.scores: dict[str, float] = {}  # of the last evaluation
        self.spent = 0.0
        self.since: float | None = None
        self.ends: list[float] = []  # CPU seconds at the end of each step

    def batch_start(self, state: State, logger: Logger) -> None:
        """Start the clock at the first batch."""
        self.since = time.process_time() if self.since is None else self.since

    def batch_end(self, state: State, logger: Logger) -> None:
        """Note the time."""
        self.ends.append(time.process_time())

    def eval_start(self, state: State, logger: Logger) -> None:
        """Stop the clock."""
        self.spent += time.process_time() - (self.since or time.process_time())

    def eval_end(self, state: State, logger: Logger) -> None:
        """Keep the scores; the clock continues."""
        self.scores = {name: float(value) for name, value in state.eval_metric_values.items()}
        self.points.append((int(state.timestamp.batch), self.scores["box_ap50"], self.spent))
        self.since = time.process_time()

    def reaches(self, ap50: float) -> tuple[int, float] | None:
        """Return steps and CPU seconds to the first evaluation of at least this AP50."""
        return next(((step, seconds) for step, value, seconds in self.points if value >= ap50), None)

    def step_seconds(self) -> float:
        """Return the mean CPU seconds per step, without the first ones."""
        measured = self.ends[min(WARMUP_STEPS, len(self.ends) - 2) :]
        return (measured[-1] - measured[0]) / (len(measured) - 1)

    def in_words(self) -> str:
        """Return every point."""
        return " ".join(f"{step}:{ap50:.3f}" for step, ap50, _ in self.points)


def train_head(changes: dict[str, Any], data: Path, run_folder: Path, steps: int, every: int, seed: int) -> Curve:
    """Train the head, and the trunk under it, on shards of `data`; nothing but boxes is taught without `changes`."""
    table.CALLBACKS = {**table.CALLBACKS, "curve": Curve}
    settings: dict[str, Any] = {
        "seed": seed,
        "run_folder": run_folder,
        "teachers": "{stream: null, num_teachers: 0}",
        "prompt.student_answer": False,
        "detection_head.num_queries": 20,
        "caption_decoder.num_layers": 2,
        "train_loader.streams.shapes.local": data,
        "eval_loader.streams.shapes.local": data,
        "evaluation": "{answers: null, max_captions: 0, num_logged_images: 0}",
        "loss": "{weight_lm_student: 0, weight_lm_teacher: 0, weight_caption: 0}",
        "trainer": f"{{max_duration: {steps}ba, eval_interval: {every}ba, save_folder: null, progress_bar: false}}",
        "trainer.device": "cpu",  # whose time is measured
        "callbacks": "{curve: {}, group_metrics: null, loss_shares: null, throughput: null, speed_monitor: null}",
        "loggers": "{tensorboard: null, wandb: null, json_lines: null}",
        "autoresume": False,
        **changes,
    }
    overrides = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]
    trainer = train_by_config(load_config(str(YAML), overrides))
    curve = next(callback for callback in trainer.state.callbacks if isinstance(callback, Curve))
    trainer.close()
    return curve


def learning_rates(rate: float) -> dict[str, float]:
    """Return all of our learning rates, those of the yaml times a factor."""
    section = yaml.safe_load(YAML.read_text(encoding="utf-8"))["optimizer"]
    names = [name for name in section if name.startswith("lr_") and name != "lr_scaling"]
    return {f"optimizer.{name}": float(section[name]) * rate for name in names}


def train_ours(
    job: Job, train: Sequence[Sample], held_out: Sequence[Sample], spec: ImageSpec, folder: Path
) -> dict[str, Any]:
    """Train on real images for a number of steps, or those that the CPU time allows; return what a job stores."""
    tiny, data = str(folder / "tiny"), folder / "data"
    build_tiny_checkpoint(tiny, seed=job.seed, image_mean=spec.image_mean, image_std=spec.image_std)
    for split, rows in {"train": train, "val": held_out}.items():
        write_split(rows, str(data), split)
    changes = {
        "model.pretrained_model_name_or_path": tiny,
        **REAL,
        **TASKS[job.task],
        **learning_rates(job.rate),
        "image.min_pixels": spec.min_pixels,
        "image.max_pixels": spec.max_pixels,
        "train_loader.global_batch_size": job.settings["batch_size"],
        "eval_loader.global_batch_size": batch_size(spec.max_pixels),  # of whole images
        "train_loader.augment": job.settings["augment"],
        **job.settings.get("changes", {}),
    }
    steps = job.settings.get("steps") or steps_in(
        job.settings["cpu_seconds"], changes, data, folder / "probe", job.seed
    )
    changes["scheduler.t_warmup"] = f"{max(1, min(50, steps // 8))}ba"
    curve = train_head(changes, data, folder / "run", steps, steps, job.seed)
    return result_of(curve.scores, steps, curve.spent)


def steps_in(seconds: float, changes: dict[str, Any], data: Path, run_folder: Path, seed: int) -> int:
    """Return how many steps a probe of thirty says that CPU seconds allow."""
    short = {**changes, "trainer.eval_subset_num_batches": 1, "scheduler.t_warmup": "1ba"}
    probe = train_head(short, data, run_folder, PROBE_STEPS, PROBE_STEPS, seed)
    return max(1, int(seconds / probe.step_seconds()))
