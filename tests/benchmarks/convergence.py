"""How many steps the head needs to find things: whole, plain, and with one ingredient changed.

    python tests/benchmarks/convergence.py [--variants NAME ...] [--steps N] [--plain-steps N] [--threads 1]

Scenes of coloured shapes, 16 a step, from the tiny random checkpoint of the quickstart; detection alone is trained, at
a constant rate after a warm-up, so that a curve does not depend on where it ends. AP50 is class-agnostic, over 128
other scenes, every 25 steps. `full` is the default head; `plain` is DETR on the same trunk: no positions in the memory,
learned queries that no layer refines, no auxiliary losses, no denoising. The others are `full` with one switch turned.

The last line is JSON: `steps_to_ap50` (by variant: steps to 0.5 and to 0.8, null where not reached, and CPU seconds to
0.5), `plain_over_full` (of the steps to 0.5; a lower bound where plain did not reach it) and `final` (last AP50).
"""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Logger, State

from convert.shapes import iter_samples
from convert.writer import write_split
from recipe.callbacks import table
from recipe.config_file import load_config
from recipe.models.tiny import build_tiny_checkpoint
from recipe.train import main as train

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "bench" / "convergence"
EVERY = 25  # steps between evaluations
PLAIN = {
    "memory_positions": False,
    "refine_boxes": False,
    "aux_loss": False,
    "num_denoising_groups": 0,
    "select_queries": False,
    "num_query_groups": 1,
    "patch_features": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "plain": {f"detection_head.{name}": value for name, value in PLAIN.items()} | {"loss.objectness": "focal"},
    "no memory_positions": {"detection_head.memory_positions": False},
    "no refine_boxes": {"detection_head.refine_boxes": False},
    "no aux_loss": {"detection_head.aux_loss": False},
    "no denoising": {"detection_head.num_denoising_groups": 0},
    "patch_features": {"detection_head.patch_features": True},
    "no patch_features": {"detection_head.patch_features": False},
    "select_queries": {"detection_head.select_queries": True},
    "no select_queries": {"detection_head.select_queries": False},
    "3 query groups": {"detection_head.num_query_groups": 3},
    "1 query group": {"detection_head.num_query_groups": 1},
    "focal": {"loss.objectness": "focal", "loss.focal_gamma": 2.0},
    "varifocal": {"loss.objectness": "varifocal", "loss.focal_gamma": 2.0},
    "mal": {"loss.objectness": "mal", "loss.focal_gamma": 1.5},
    "caption cost": {"matcher.cost_caption": 0.5, "loss.weight_caption": 1.0},
}


class Curve(Callback):
    """AP50 and the CPU time of training, at every evaluation."""

    def __init__(self):
        self.points: list[tuple[int, float, float]] = []  # steps, AP50, CPU seconds without evaluations
        self.spent = 0.0
        self.since = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        """The clock starts."""
        self.since = time.process_time()

    def eval_start(self, state: State, logger: Logger) -> None:
        """It stops."""
        self.spent += time.process_time() - self.since

    def eval_end(self, state: State, logger: Logger) -> None:
        """A point; it goes on."""
        step, ap50 = int(state.timestamp.batch), float(state.eval_metric_values["box_ap50"])
        self.points.append((step, ap50, self.spent))
        self.since = time.process_time()

    def reaches(self, ap50: float) -> tuple[int, float] | None:
        """Steps and CPU seconds to the first evaluation of at least so much."""
        return next(((step, seconds) for step, value, seconds in self.points if value >= ap50), None)


def make_data() -> None:
    """Scenes and the tiny checkpoint, where they are not there yet."""
    for split, (num_samples, seed) in {"train": (6000, 1), "val": (128, 2)}.items():
        if not (FOLDER / "data" / split / "index.json").exists():
            scenes = iter_samples(num_samples, seed, image_size=112, max_objects=3)
            write_split(scenes, str(FOLDER / "data"), split)
    if not (FOLDER / "tiny").exists():
        build_tiny_checkpoint(str(FOLDER / "tiny"))


def run(changes: dict[str, Any], steps: int, seed: int) -> Curve:
    """Trains one variant."""
    settings: dict[str, Any] = {
        "seed": seed,
        "run_folder": FOLDER / "run",
        "model.pretrained_model_name_or_path": FOLDER / "tiny",
        "teachers": "{stream: null, num_teachers: 0}",
        "train_loader.streams.shapes.local": FOLDER / "data",
        "eval_loader.streams.shapes.local": FOLDER / "data",
        "evaluation": "{generate_answer: false, max_captions: 0, num_logged_images: 0}",
        "loss": "{weight_lm_student: 0, weight_lm_teacher: 0, weight_caption: 0}",
        "scheduler.name": "constant",
        "trainer": f"{{max_duration: {steps}ba, eval_interval: {EVERY}ba, save_folder: null, progress_bar: false}}",
        "callbacks": "{curve: {}, group_metrics: null, loss_shares: null, throughput: null, speed_monitor: null}",
        "loggers": "{tensorboard: null, wandb: null, json_lines: null}",
        "autoresume": False,
        **changes,
    }
    overrides = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]
    trainer = train(load_config(str(ROOT / "yamls" / "quickstart.yaml"), overrides))
    curve = next(callback for callback in trainer.state.callbacks if isinstance(callback, Curve))
    trainer.close()
    return curve


def report(curves: dict[str, Curve]) -> dict[str, Any]:
    """Prints the table; the figures of the last line."""
    print("| variant | steps to 0.5 | CPU s | steps to 0.8 | AP50 at the end | of step |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    reached: dict[str, Any] = {}
    for name, curve in curves.items():
        half, most = curve.reaches(0.5), curve.reaches(0.8)
        step, ap50, _ = curve.points[-1]
        reached[name] = {"0.5": half and half[0], "0.8": most and most[0], "cpu_s": half and round(half[1], 1)}
        cells = [half and half[0], half and round(half[1]), most and most[0], round(ap50, 3), step]
        print(f"| {name} | " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |")
    figures: dict[str, Any] = {
        "steps_to_ap50": reached,
        "final": {n: round(c.points[-1][1], 4) for n, c in curves.items()},
    }
    if {"plain", "full"} <= curves.keys() and (full := curves["full"].reaches(0.5)):
        plain = curves["plain"].reaches(0.5)
        figures["plain_over_full"] = round((plain or curves["plain"].points[-1])[0] / full[0], 2)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the variants one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--plain-steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    logging.disable(logging.INFO)
    table.CALLBACKS = {**table.CALLBACKS, "curve": Curve}
    make_data()
    curves: dict[str, Curve] = {}
    for name in args.variants:
        curves[name] = run(VARIANTS[name], args.plain_steps if name == "plain" else args.steps, args.seed)
        points = " ".join(f"{step}:{ap50:.3f}" for step, ap50, _ in curves[name].points)
        print(f"{name}: {points}", flush=True)
    print(json.dumps(report(curves)))


if __name__ == "__main__":
    main()
