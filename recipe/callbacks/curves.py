"""Draw what a run has logged: `curves.png` in its folder, and `python -m recipe.callbacks.curves METRICS --out PNG`."""

import argparse
import json
import logging
from collections import defaultdict
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from composer import Callback
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

log = logging.getLogger(__name__)

CURVES_FILE = "curves.png"
Curves = Mapping[str, tuple[list[int], list[float]]]  # steps and values by metric

# Title, start of the metrics' names, logarithmic.
PANELS = (
    ("loss terms, not weighted", "loss/train/loss_", True),
    ("share of the total loss", "loss/share/", False),
    ("evaluation", "metrics/eval/", False),
    ("learning rates", "lr/", False),
    ("gradient norm of each group, before clipping", "gradient_norm/", True),
    ("weight norm of each group", "weight_norm/", True),
    ("update ratio of each group, |step| / |weights|", "update_ratio/", True),
)
LEFT_OUT = ("_aux", "_dn", "_group", "_proposals")
EVALUATION = ("box_ap", "box_ap50", "caption_match", "text_f1", "text_parse_failure_rate")
SMOOTHING = 20


class DrawCurves(Callback):
    """Draws losses, norms, learning rates and scores at the end of a run, on rank 0; no failure ends the run.

    Args:
        metrics: File of the logger `json_lines`.
        path: The image to write.
    """

    def __init__(self, metrics: str | Path, path: str | Path):
        self.metrics = Path(metrics)
        self.path = Path(path)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Write the image; log a warning if it cannot be drawn."""
        if dist.get_global_rank() == 0:
            try:
                draw_curves(read_curves(self.metrics), self.path)
            except Exception as error:  # whatever matplotlib, the file or the disk raise: the run has ended well
                log.warning(
                    "%s is not drawn (%s: %s); training is not affected", self.path, type(error).__name__, error
                )


def read_curves(path: Path) -> Curves:
    """Return every metric of the file over the steps at which it was logged as a finite number.

    The last value of a step counts. A line that is cut off, as by a full disk, is left out.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        for name, value in row["metrics"].items():
            if row["step"] is not None and (number := _number(value)) is not None:
                found[name][row["step"]] = number
    return {name: ([*points], [*points.values()]) for name, points in found.items()}


def _number(value: Any) -> float | None:
    """Return a finite number, None for what cannot be drawn: NaN, infinities, texts, lists."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if isfinite(number) else None


def draw_curves(curves: Curves, path: Path) -> None:
    """Draw the panels that have curves into a PNG.

    Raises:
        ValueError: None has.
    """
    # Imported late: it takes a second. A figure of its own, without pyplot, whatever backend the process has chosen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if _chosen(curves, panel[1])]
    if not panels:
        raise ValueError("nothing was logged that has a panel")
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.6 * rows), layout="constrained")
    for place, (title, start, logarithmic) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        is_smoothed = _draw_panel(axes, _chosen(curves, start), start == "metrics/eval/", logarithmic)
        axes.set_title(f"{title}\nmean of {SMOOTHING} steps" if is_smoothed else title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7, which="both")
    FigureCanvasAgg(figure).print_png(str(path), pil_kwargs={"optimize": True})


def _chosen(curves: Curves, start: str) -> Curves:
    """Return the curves of a panel under the rest of their names."""
    chosen: dict[str, tuple[list[int], list[float]]] = {}
    for name, curve in sorted(curves.items()):
        label = name.removeprefix(start)
        is_shown = label in EVALUATION if start == "metrics/eval/" else not name.endswith(LEFT_OUT)
        if label != name and is_shown:
            chosen[label] = curve
    return chosen


def _draw_panel(axes: Any, curves: Curves, is_evaluation: bool, logarithmic: bool) -> bool:
    """Draw curves, later ones thinner, as equal ones would hide each other; return whether any is smoothed."""
    is_smoothed = False
    for number, (label, (steps, values)) in enumerate(curves.items()):
        if logarithmic and max(values) <= 0:  # such as the loss of teachers that a run does not have
            continue
        if len(values) > 10 * SMOOTHING:
            is_smoothed = True
            means = [sum(values[end - SMOOTHING : end]) / SMOOTHING for end in range(SMOOTHING, len(values) + 1)]
            steps, values = steps[SMOOTHING - 1 :], means
        marker = "o" if is_evaluation or len(steps) == 1 else ""
        axes.plot(steps, values, label=label, linewidth=2.6 / (1 + 0.3 * number), marker=marker, markersize=4)
    if logarithmic:
        axes.set_yscale("log", nonpositive="mask")
    if axes.lines:
        axes.legend(fontsize=7, frameon=False)
    return is_smoothed


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--out", type=Path, default=Path(CURVES_FILE))
    args = parser.parse_args()
    curves = read_curves(args.metrics)
    draw_curves(curves, args.out)
    print(f"{args.out}: {len(curves)} metrics")


if __name__ == "__main__":
    main()
