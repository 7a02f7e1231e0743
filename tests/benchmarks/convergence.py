"""How many steps the head needs to find things: whole, plain, and with one ingredient changed.

    python tests/benchmarks/convergence.py [--variants NAME ...] [--steps N] [--plain-steps N] [--seeds SEED ...]
        [--real SHARED_DATA] [--real-sets NAME ...] [--real-tasks NAME ...] [--real-steps N]

Scenes of coloured shapes, 16 a step, from the tiny random checkpoint of the quickstart; detection alone is trained, at
a constant rate after a warm-up, so that a curve does not depend on where it ends. AP50 is class-agnostic, over 128
other scenes, every 25 steps. `full` is the default head; `plain` is DETR on the same trunk: no positions in the memory,
learned queries that no layer refines, no auxiliary losses, no denoising, attention that starts anywhere; DETR's own
encoder has positions, so there is also `plain with positions`. The others are `full` with one switch turned.

The default head also learns two sets of real pictures, split 80/20 by picture, from a tiny random
checkpoint that normalises pixels by the training pictures' own mean and deviation, as one does from scratch (pale blood
cells vary by 0.2 to 0.4 of what Qwen's constants call one). Hugging Face's Deformable and Conditional DETR learn them
from scratch (`peer_detr.py`), normalised alike, at the same size of picture, each for the CPU time that training ours
took. There are two tasks: `captions`, where ours learns to write what each object is and the peers learn it as a class,
and `boxes`, where ours learns no captions and the peers one class. Both are judged by AP50 without classes on the
held-out fifth at the end.

The last line is JSON: `steps_to_ap50` (by variant: steps to 0.5 and to 0.8, null where not reached, and CPU seconds to
each), `plain_over_full` (of the steps to 0.5; a lower bound where plain did not reach it), `final` (last AP50 by
variant) and `real` (of the first seed, by data set: `ours`, `peer`, the better of the two, and both by name, of the
task `captions`; those of `boxes` below `boxes`).
"""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from math import inf
from pathlib import Path
from statistics import median, median_high
from typing import Any

import torch
from composer import Callback, Logger, State
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from convert.shapes import iter_samples
from convert.write import write_split
from peer_detr import Budget, build_peer, train_peer
from real_sets import REAL, make_real_set
from recipe.callbacks import table
from recipe.configure import load_config
from recipe.tiny import build_tiny_checkpoint
from recipe.train import main as train

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
FOLDER = ROOT / "bench" / "convergence"
EVERY = 25  # steps between evaluations
SCENES = {"train": (6000, 1), "val": (128, 2)}  # number and seed
PLAIN = {
    "memory_positions": False,
    "local_attention": False,
    "refine_boxes": False,
    "aux_loss": False,
    "num_denoising_groups": 0,
}
POSITIONS = "memory_positions"
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "plain": {f"detection_head.{name}": value for name, value in PLAIN.items()},
    "plain with positions": {f"detection_head.{name}": value for name, value in PLAIN.items() if name != POSITIONS},
    "no memory_positions": {"detection_head.memory_positions": False},
    "no local_attention": {"detection_head.local_attention": False},
    "no refine_boxes": {"detection_head.refine_boxes": False},
    "no aux_loss": {"detection_head.aux_loss": False},
    "no denoising": {"detection_head.num_denoising_groups": 0},
    "patch_features": {"detection_head.patch_features": True},
    # Of the 16 vision tokens of a scene, so that there is something to select.
    "8 queries": {"detection_head.num_queries": 8},
    "8 queries, selected": {"detection_head.num_queries": 8, "detection_head.select_queries": True},
    "3 query groups": {"detection_head.num_query_groups": 3},
    "mal": {"loss.objectness": "mal", "loss.focal_gamma": 1.5},
    "ema": {"ema": "{half_life: 20ba}"},
}
REAL_SETS = ("chess_train", "bccd_trainval")
# What our head learns beside boxes.
TASKS: dict[str, dict[str, Any]] = {
    "captions": {"loss.weight_caption": 4.0, "caption_decoder.max_caption_tokens": "null"},
    "boxes": {},
}
PEERS = {"deformable": 1e-3, "conditional": 1e-3}  # learning rates: better on chess_train than 3e-4


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

    def told(self) -> str:
        """Every point."""
        return " ".join(f"{step}:{ap50:.3f}" for step, ap50, _ in self.points)


def make_data() -> None:
    """Scenes and the tiny checkpoint, where they are not there yet."""
    for split, (num_samples, seed) in SCENES.items():
        if not (FOLDER / "data" / split / "index.json").exists():
            scenes = iter_samples(num_samples, seed, image_size=112, max_objects=3)
            write_split(scenes, str(FOLDER / "data"), split)
    if not (FOLDER / "tiny").exists():
        build_tiny_checkpoint(str(FOLDER / "tiny"))


def train_head(changes: dict[str, Any], data: Path, steps: int, every: int, seed: int) -> Curve:
    """Trains the head, and the trunk under it, on shards of `data`; nothing but boxes is taught."""
    settings: dict[str, Any] = {
        "seed": seed,
        "run_folder": FOLDER / "run",
        "model.pretrained_model_name_or_path": FOLDER / "tiny",
        "teachers": "{stream: null, num_teachers: 0}",
        "prompt.student_answer": False,
        "detection_head.num_queries": 20,
        "caption_decoder.num_layers": 2,
        "train_loader.streams.shapes.local": data,
        "eval_loader.streams.shapes.local": data,
        "evaluation": "{answers: null, max_captions: 0, num_logged_images: 0}",
        "loss": "{weight_lm_student: 0, weight_lm_teacher: 0, weight_caption: 0}",
        "trainer": f"{{max_duration: {steps}ba, eval_interval: {every}ba, save_folder: null, progress_bar: false}}",
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


def compare_on_real(source: Path, task: str, steps: int, seed: int) -> dict[str, Any]:
    """Ours and the peers on one set of real pictures and one of `TASKS`, in AP50."""
    data = FOLDER / source.name / str(seed)
    train_part, val_part = make_real_set(source, data, seed)
    samples = [*train_part, *val_part]
    changes = {"model.pretrained_model_name_or_path": data / "tiny", **REAL, **TASKS[task]}
    curve = train_head(changes, data, steps, every=max(1, steps // 4), seed=seed)
    _, ap50, seconds = curve.points[-1]
    print(f"{source.name}, {task}, ours: {curve.told()}, {seconds:.0f} CPU s", flush=True)
    sizes = {(sample.height, sample.width) for sample in samples}
    assert len(sizes) == 1, f"the peers' pictures are one batch of one size, but {source.name} has {sizes}"
    size = smart_resize(*sizes.pop(), min_pixels=REAL["image.min_pixels"], max_pixels=REAL["image.max_pixels"])
    found: dict[str, Any] = {"ours": round(ap50, 4), "cpu_s": round(seconds)}
    for kind, learning_rate in PEERS.items():
        torch.manual_seed(seed)
        names = (
            sorted({item.caption for sample in samples for item in sample.objects or ()}) if task == "captions" else []
        )
        peer = build_peer(
            kind, max(len(names), 1), REAL["detection_head.num_queries"], width=128, num_layers=2, num_heads=4
        )
        budget = Budget(seconds, REAL["train_loader.global_batch_size"], learning_rate)
        found[kind], peer_steps = train_peer(peer, train_part, val_part, size, budget, seed, names)
        print(f"{source.name}, {task}, {kind}: {found[kind]:.3f} after {peer_steps} steps", flush=True)
    return found | {"peer": max(found[kind] for kind in PEERS)}


def reached(curves: Sequence[Curve], ap50: float) -> tuple[int, float] | tuple[None, None]:
    """Steps and CPU seconds to an AP50, of the seeds' median in steps; None where it did not get there."""
    steps, seconds = median_high(curve.reaches(ap50) or (inf, inf) for curve in curves)
    return (None, None) if steps == inf else (int(steps), round(seconds))


def report(curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """Prints the table; the figures of the last line."""
    print("| variant | steps to 0.5 | CPU s | steps to 0.8 | CPU s | AP50 at the end | of step |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows: dict[str, Any] = {}
    final: dict[str, float] = {}
    for name, seeds in curves.items():
        row = rows[name] = {}
        for level in (0.5, 0.8):
            row[str(level)], row[f"{level} cpu_s"] = reached(seeds, level)
        step, last = seeds[0].points[-1][0], sorted(curve.points[-1][1] for curve in seeds)
        final[name] = round(median(last), 4)
        spread = f" ({last[0]:.2f}-{last[-1]:.2f})" if len(last) > 1 else ""
        cells = ["-" if cell is None else str(cell) for cell in row.values()]
        print(f"| {name} | {' | '.join(cells)} | {final[name]:.3f}{spread} | {step} |")
    figures: dict[str, Any] = {"steps_to_ap50": rows, "final": final}
    if {"plain", "full"} <= curves.keys() and (full := rows["full"]["0.5"]):
        figures["plain_over_full"] = round((rows["plain"]["0.5"] or curves["plain"][0].points[-1][0]) / full, 2)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the variants one after the other, then the sets of real pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--plain-steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17], metavar="SEED")
    parser.add_argument("--real", type=Path, default=DATA, metavar="SHARED_DATA", help="folder of the real sets")
    parser.add_argument("--real-sets", nargs="*", choices=REAL_SETS, default=REAL_SETS, metavar="NAME")
    parser.add_argument("--real-tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="NAME")
    parser.add_argument("--real-steps", type=int, default=400)
    args = parser.parse_args(arguments)
    missing = [name for name in args.real_sets if not (args.real / name).is_dir()]
    if missing:
        parser.error(f"no {' and no '.join(missing)} in {args.real}: give --real SHARED_DATA, or --real-sets for none")
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    table.CALLBACKS = {**table.CALLBACKS, "curve": Curve}
    make_data()
    curves: dict[str, list[Curve]] = {name: [] for name in args.variants}
    for seed in args.seeds:
        for name in args.variants:
            steps = args.plain_steps if name.startswith("plain") else args.steps
            changes = {"scheduler.name": "constant", **VARIANTS[name]}
            curves[name].append(train_head(changes, FOLDER / "data", steps, EVERY, seed))
            print(f"{name}, seed {seed}: {curves[name][-1].told()}", flush=True)
    figures = report(curves)
    figures["real"] = {}
    for name in args.real_sets:
        tasks = {
            task: compare_on_real(args.real / name, task, args.real_steps, args.seeds[0]) for task in args.real_tasks
        }
        figures["real"][name] = {**tasks.pop("captions", {}), **tasks}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
