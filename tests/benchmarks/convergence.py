"""Measure how many steps the head needs to find things: whole, plain, with one ingredient changed, and against peers.

    python tests/benchmarks/convergence.py [--variants NAME ...] [--steps N] [--plain-steps N] [--seeds SEED ...]
    python tests/benchmarks/convergence.py --variants --real SHARED_DATA --real-sets NAME_OR_FOLDER ...
        [--real-tasks NAME ...] [--real-models NAME ...] [--real-variants NAME ...] [--seeds SEED ...]
        [--cpu-seconds N | --real-steps N] [--augment NAME] [--choose-rates] [--results FOLDER] [--from-results]
        [--accept-other-commits]

**Scenes of coloured shapes**, 16 per step, from the tiny random checkpoint of the quickstart. Detection alone is
trained, at a constant rate after a warm-up, so that a curve does not depend on its end. AP50 is class-agnostic, over
128 other scenes, every 25 steps. `full` is the default head. `plain` is DETR on the same trunk: no positions in the
memory, learned queries that no layer refines, no auxiliary losses, no denoising, attention that starts anywhere. DETR's
own encoder has positions, so there is also `plain with positions`. The others are `full` with one switch turned.

**Sets of real images**, folders with `images` and `instances.json`. Ours and the peers (`peer_detr.py`) are trained
from scratch, each for `--cpu-seconds` of one core, in two tasks. In `captions` ours learns to write what each object is
and the peers learn it as a class. In `boxes` ours learns no captions and the peers one class. All are judged without
classes, by COCO's scores of the held-out fifth, with the weights of the end. For everybody:

- The held-out fifth is the same for all seeds. Learning rates are the defaults, or with `--choose-rates` the best of
  three factors on a fifth of the *training* images, with a third of the CPU time.
- Images have as many pixels as bring the first quartile of the training objects' shorter sides to 24, between 100,352
  pixels and the stored size (`real_sets.pixel_budget`). Images per step follow from what is shown in training. Pixels
  are normalised by the training images' own mean and deviation (pale blood cells vary by 0.2 to 0.4 of what Qwen's
  constants call one).
- `--augment` is drawn and applied by the recipe's own functions. `parts` trains on flipped and random parts of about
  100,352 pixels, at the scale of the whole images (`real_sets.augmentation_of`), and as many images per step as that
  allows. `auto` is `parts` for sets whose images have more than twice as many pixels, else `none`. Evaluation is on
  whole images.
- The clock counts training: loading too, but no start, evaluation or probe. Ours makes the number of steps that a probe
  of thirty says will fit; peers stop when the time is over. `cpu_s` is what was taken.

`--real-variants` also trains ours with a switch turned, reported as `ours, NAME`. `--real-steps` trains ours for that
many steps instead of CPU time, which isolates what augmentation does.

Each (set, task, model, seed) is a job. Its result is stored in `--results`, and found again by its settings and by the
files that decide it: ours by `recipe/`, a peer's by few. So a killed run continues, work can be spread over processes
by `--real-sets`, `--real-tasks`, `--real-models` and `--seeds`, and `--from-results` prints what there is.

The last line is JSON: `steps_to_ap50` (by variant: steps to 0.5 and to 0.8, null if not reached, and CPU seconds to
each), `plain_over_full` (of the steps to 0.5; a lower bound if plain did not reach it), `final` (last AP50 by
variant), `real` (by set and task: `ours`, the peers by name, and `peer`, the best, with its `name`; each `ap50`, `ap`,
`ap_small` (null without small objects) and `cpu_s` as [median, minimum, maximum] over the seeds) and `rates`
(`default`, `chosen` or `partly chosen`).
"""

import argparse
import json
import logging
from collections.abc import Sequence
from math import inf
from pathlib import Path
from statistics import median, median_high
from typing import Any

import torch

from compare_real import MODELS, Comparison, RealSet
from convert.shapes import iter_samples
from convert.write import write_split
from jobs import ROOT, Job, ResultError, Store
from our_head import Curve, train_head
from real_report import figures_of, print_tables
from real_sets import AUGMENTS, TASKS, SetError, find_set
from recipe.tiny import build_tiny_checkpoint

DATA = ROOT.parent / "shared" / "data"
FOLDER = ROOT / "bench" / "convergence"
EVERY = 25  # steps between evaluations
SCENES = {"train": (6000, 1), "val": (128, 2)}  # number and seed
ONE_SCALE = {"detection_head.multi_scale": False, "detection_head.select_queries": False}
PLAIN = {
    "multi_scale": False,
    "select_queries": False,
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
    "no multi_scale": ONE_SCALE,
    "no multi_scale, no local_attention": {**ONE_SCALE, "detection_head.local_attention": False},
    "no multi_scale, no denoising": {**ONE_SCALE, "detection_head.num_denoising_groups": 0},
    "no select_queries": {"detection_head.select_queries": False},
    "8 queries": {"detection_head.num_queries": 8},
    "8 queries, no select_queries": {"detection_head.num_queries": 8, "detection_head.select_queries": False},
    "3 query groups": {"detection_head.num_query_groups": 3},
    "mal": {"loss.objectness": "mal", "loss.focal_gamma": 1.5},
    "ema": {"ema": "{half_life: 20ba}"},
}
REAL_SETS = ("chess_train", "bccd_trainval", "wagon_train")


def make_data() -> None:
    """Write the scenes and the tiny checkpoint, unless they are there."""
    for split, (num_samples, seed) in SCENES.items():
        if not (FOLDER / "data" / split / "index.json").exists():
            scenes = iter_samples(num_samples, seed, image_size=112, max_objects=3)
            write_split(scenes, str(FOLDER / "data"), split)
    if not (FOLDER / "tiny").exists():
        build_tiny_checkpoint(str(FOLDER / "tiny"))


def train_variant(name: str, steps: int, seed: int) -> Curve:
    """Train a variant of the head on the scenes."""
    changes = {
        "model.pretrained_model_name_or_path": FOLDER / "tiny",
        "scheduler.name": "constant",
        **VARIANTS[name],
    }
    return train_head(changes, FOLDER / "data", FOLDER / "run", steps, EVERY, seed)


def find_sets(shared: Path, names: Sequence[str]) -> list[RealSet]:
    """Return the sets of these names below `shared`, or with these paths.

    Raises:
        SetError: One is missing, or two have one name, by which results are reported.
    """
    sets = [RealSet(shared / name if (shared / name).is_dir() else Path(name)) for name in names]
    missing = [name for name, real_set in zip(names, sets, strict=True) if not real_set.folder.is_dir()]
    if missing:
        raise SetError(
            f"no {' and no '.join(missing)} in {shared}: give --real SHARED_DATA, paths, or --real-sets for none"
        )
    for real_set in sets:
        find_set(real_set.folder)
    known = [real_set.name for real_set in sets]
    if double := sorted({name for name in known if known.count(name) > 1}):
        raise SetError(f"two sets have the name {double[0]!r}: give them in two runs, or rename a folder")
    return sets


def compare(comparison: Comparison, chooses_rates: bool, only_stored: bool) -> dict[str, Any]:
    """Run all jobs of a comparison that are not stored, and print the tables; return the figures of the last line."""
    if chooses_rates and not only_stored:
        for real_set, job in comparison.all_choices():
            comparison.run(real_set, job)
    found: list[tuple[Job, bool, dict[str, Any]]] = []
    for real_set, job, is_chosen in comparison.all_jobs():
        row = comparison.store.find(job) if only_stored else comparison.run(real_set, job)
        if row is None:
            print(f"{job.name}: no result")
        else:
            found.append((job, is_chosen, row))
    figures = figures_of(found)
    print_tables(figures["real"])
    return figures


def reached(curves: Sequence[Curve], ap50: float) -> tuple[int, float] | tuple[None, None]:
    """Return steps and CPU seconds to an AP50, of the seeds' median in steps; None if it did not get there."""
    steps, seconds = median_high(curve.reaches(ap50) or (inf, inf) for curve in curves)
    return (None, None) if steps == inf else (int(steps), round(seconds))


def report(curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """Print the table and return the figures of the last line."""
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
    """Run the variants one after the other, then the sets of real images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--plain-steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17], metavar="SEED")
    parser.add_argument("--real", type=Path, default=DATA, metavar="SHARED_DATA", help="folder of the real sets")
    parser.add_argument("--real-sets", nargs="*", default=REAL_SETS, metavar="NAME_OR_FOLDER")
    parser.add_argument("--real-tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="NAME")
    parser.add_argument("--real-models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME")
    parser.add_argument("--real-variants", nargs="+", choices=list(VARIANTS), default=[], metavar="NAME")
    parser.add_argument("--real-steps", type=int, metavar="N", help="of each training of ours, instead of CPU time")
    parser.add_argument("--cpu-seconds", type=float, default=300, metavar="N", help="of each training on real images")
    parser.add_argument("--augment", choices=AUGMENTS, default="auto", help="of ours and of the peers")
    parser.add_argument("--choose-rates", action="store_true", help="first choose learning rates on training images")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", metavar="FOLDER")
    parser.add_argument("--from-results", action="store_true", help="train nothing: print what is stored")
    parser.add_argument("--accept-other-commits", action="store_true", help="count results of other code too")
    args = parser.parse_args(arguments)
    if args.real_steps is not None and args.real_models != ["ours"]:
        parser.error("--real-steps is for ours alone, peers train for a CPU time: add --real-models ours")
    changes = {f"ours, {name}": VARIANTS[name] for name in args.real_variants}
    try:
        sets = find_sets(args.real, args.real_sets)
    except SetError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    figures: dict[str, Any] = {}
    if not args.from_results:
        if args.variants:
            make_data()
        curves: dict[str, list[Curve]] = {name: [] for name in args.variants}
        for seed in args.seeds:
            for name in args.variants:
                steps = args.plain_steps if name.startswith("plain") else args.steps
                curves[name].append(train_variant(name, steps, seed))
                print(f"{name}, seed {seed}: {curves[name][-1].in_words()}", flush=True)
        figures = report(curves)
    comparison = Comparison(
        sets,
        args.real_tasks,
        [*args.real_models, *changes],
        args.seeds,
        args.cpu_seconds,
        args.augment,
        Store(args.results, args.accept_other_commits),
        scratch=FOLDER,
        steps=args.real_steps,
        changes=changes,
    )
    try:
        figures |= compare(comparison, args.choose_rates, args.from_results)
    except (SetError, ResultError) as error:
        parser.error(str(error))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
