"""Draws what a run has logged: `python tests/benchmarks/curves.py RUN_FOLDER/metrics.jsonl --out curves.png`."""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

Curves = dict[str, tuple[list[int], list[float]]]  # steps and values by metric

# Title, unit, start of the metrics' names, logarithmic.
PANELS = (
    ("loss terms, not weighted", "mean of 20 steps", "loss/train/loss_", True),
    ("share of the total loss", "mean of 20 steps", "loss/share/", False),
    ("evaluation", "", "metrics/eval/", False),
    ("gradient norm of each group", "before clipping, mean of 20 steps", "gradient_norm/", True),
    ("update ratio of each group", "|step| / |weights|", "update_ratio/", True),
    ("learning rates", "", "lr/", False),
)
LEFT_OUT = ("_aux", "_dn")
EVALUATION = ("box_ap50", "caption_match", "text_f1", "text_parse_failure_rate")
SMOOTHING = 20


def read_curves(path: Path) -> Curves:
    """Every metric of the file over the steps at which it was logged as a finite number."""
    curves: Curves = defaultdict(lambda: ([], []))
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row["metrics"].items():
            if np.isfinite(float(value)):
                steps, values = curves[name]
                steps.append(row["step"])
                values.append(float(value))
    return curves


def draw_panel(axes: Axes, curves: Curves, start: str, logarithmic: bool) -> None:
    """All curves whose name has that start, each under the rest of its name."""
    for name, (steps, values) in sorted(curves.items()):
        label = name.removeprefix(start)
        is_evaluation = start == "metrics/eval/"
        if label == name or name.endswith(LEFT_OUT) or (is_evaluation and label not in EVALUATION):
            continue
        if len(values) > 10 * SMOOTHING:
            steps = steps[SMOOTHING - 1 :]
            values = list(np.convolve(values, np.ones(SMOOTHING) / SMOOTHING, "valid"))
        axes.plot(steps, values, label=label, linewidth=1.2, marker="o" if is_evaluation else "")
    if logarithmic:
        axes.set_yscale("log")
    axes.legend(fontsize=7, frameon=False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    curves = read_curves(args.metrics)
    figure, grid = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axes, (title, unit, start, logarithmic) in zip(grid.flat, PANELS, strict=True):
        axes.set_title(f"{title}\n{unit}" if unit else title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        draw_panel(axes, curves, start, logarithmic)
    figure.savefig(args.out, dpi=80)
    print(f"{args.out}: {len(curves)} metrics")


if __name__ == "__main__":
    main()
