"""Measure every speed in one run; write the table of RESULTS.md and one line of JSON.

    python tests/benchmarks/all.py [--only NAME ...] [--quick] [--results FILE]

It runs the scripts of this folder in turn, each in a process of its own, and reads the JSON in which each ends. Nothing
is measured here. It takes about half an hour on two quiet cores. It needs the files of `make quickstart`,
`../shared/data` and commit 2d61bb2, the older build. The full convergence is read from its stored results. What takes
longer is not run: `quickstart.py`, `words.py`, `overfit.py`, `photos.py`, `frozen_trunk.py`, `class_ap.py` and
`real_size.py`.

In RESULTS.md only the lines between `<!-- all.py -->` and `<!-- end -->` change, and of those only the lines of the
figures that were measured. A benchmark that fails leaves its lines as they are and is named at the end; the exit status
is then 1. `--quick` shows that all of it works, on the smallest sizes. Its figures mean nothing and need `--results`.
The last line is JSON, by figure: `reached`, `today` (what 2d61bb2 reaches in the same run, or the figure that the aim
was set from), `ratio` and `asked`; null if there is none.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
DATA = "../shared/data"
CHECKPOINT = "quickstart/run/checkpoints/latest-rank0.pt"
BEGIN, END = "<!-- all.py -->", "<!-- end -->"
HEADER = ("figure", "2d61bb2, or the figure of the aim", "reached", "ratio", "asked", "of", "day")
Value = float | str | None


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        what: Its first cell, with the unit.
        reached: The place in the script's JSON: names, with dots between.
        today: The same, if the script measures the older build too; else a number.
        ratio: The same; None if none is asked.
        asked: In words.
    """

    what: str
    reached: str
    today: str | float | None = None
    ratio: str | None = None
    asked: str = ""

    def read(self, report: Mapping[str, Any]) -> dict[str, Value]:
        """Return the figures of a script's JSON."""
        today = value_at(report, self.today) if isinstance(self.today, str) else self.today
        ratio = None if self.ratio is None else value_at(report, self.ratio)
        return {"today": today, "reached": value_at(report, self.reached), "ratio": ratio, "asked": self.asked or None}


@dataclass(frozen=True)
class Benchmark:
    """A script with its arguments, and what is read of its JSON.

    Attributes:
        command: Below tests/benchmarks.
        figures: Read of its last line.
        quick: The arguments of `--quick`; None: it cannot be quick, and is left out.
        needs: Files without which it cannot run, with the command that makes them.
    """

    command: tuple[str, ...]
    figures: tuple[Figure, ...]
    quick: tuple[str, ...] | None = None
    needs: tuple[tuple[str, str], ...] = ()

    def arguments(self, quick: bool) -> list[str]:
        """Return what follows `python tests/benchmarks/`."""
        return [self.command[0], *(self.quick or ())] if quick else list(self.command)


SHARED = ((DATA, "put the sets of real images there"),)
TRAINED = ((CHECKPOINT, "run `make quickstart`"),)
BENCHMARKS: dict[str, Benchmark] = {
    "build": Benchmark(
        ("build_speed.py",),
        (
            Figure("start, CPU s above the imports", "start_s.new", "start_s.old", "start_s.ratio", "0.5"),
            Figure(
                "step at the settings of both builds, CPU ms",
                "step_same_settings_ms.new", "step_same_settings_ms.old", "step_same_settings_ms.ratio",
            ),
            Figure(
                "step of the quickstart, CPU ms",
                "step_quickstart_ms.new", "step_quickstart_ms.old", "step_quickstart_ms.ratio", "0.71",
            ),
        ),
        ("--repeats", "1", "--steps", "7"),
    ),
    "plan": Benchmark(
        ("plan_cost.py", "10000000"),
        (
            Figure("plan of 10 million samples, CPU s", "seconds", 39, asked="15"),
            Figure("plan of 10 million samples, GB", "peak_gb", 2.4, asked="1"),
        ),
        ("10000",),
    ),
    "loader": Benchmark(
        ("throughput.py",),
        (
            Figure("loader over Hugging Face's fast processor", "loader_over_hf", 5.5, "loader_over_hf", "8"),
            Figure("packed step over padded rows", "packed_over_padded", 1.97, "packed_over_padded"),
            Figure("packed step over a dense mask", "packed_over_dense", 3.94, "packed_over_dense"),
        ),
        ("--repeats", "1"),
        SHARED,
    ),
    "answering": Benchmark(
        ("answering.py",),
        (
            Figure("head over text, the worst batch size", "ratio", 6.4, "ratio", "10"),
            Figure("boxes/s of the head there", "boxes_per_s_head", 629),
            Figure("boxes/s of the text there", "boxes_per_s_text", 72),
        ),
        ("--images", "8", "--repeats", "1"),
        TRAINED,
    ),
    "evaluation": Benchmark(
        ("evaluation_cost.py", "yamls/quickstart.yaml", CHECKPOINT, "--answers", "32"),
        (
            Figure("last evaluation with all answers, CPU ms per image", "last, all answers.total", 76.6),
            Figure("evaluation with 32 answers, CPU ms per image", "32 answers.total", 76.6),
        ),
        needs=TRAINED,
    ),
    "monitors": Benchmark(
        ("overhead.py", "--steps", "5"),
        (
            Figure(
                "monitors over Composer's at one interval",
                "metrics_over_optimizer_monitor", 0.86, "metrics_over_optimizer_monitor", "0.5",
            ),
        ),
        ("--steps", "2", "--hidden-size", "64", "--num-layers", "2"),
    ),
    "criterion": Benchmark(
        ("criterion.py", "--baseline", "2d61bb2"),
        (
            Figure("criterion over Hugging Face's", "speedup_over_hf", 19, "speedup_over_hf", "19"),
            Figure(
                "criterion, 64 images x 900 queries, CPU s", "large_new_s", "large_old_s", "large_old_over_new", "2"
            ),
        ),
        ("--repeats", "1", "--num-layers", "1", "--baseline", "."),
    ),
    "metrics": Benchmark(
        ("metrics_speed.py", "--repeats", "3"),
        (
            Figure(
                "scores of boxes, CPU s; over faster-coco-eval",
                "boxes_new_s", "boxes_old_s", "boxes_over_coco", "1.3",
            ),
            Figure("scores of captions, CPU s", "captions_new_s", "captions_old_s", "captions_over_old", "0.5"),
            Figure("peak of both, MiB", "peak_new_mib", "peak_old_mib"),
        ),
        ("--repeats", "1", "--images", "40"),
    ),
    "conversion": Benchmark(
        ("conversion_speed.py",),
        (
            Figure(
                "conversion over a loop that decodes, images per core-second",
                "converted_over_decoded", None, "converted_over_decoded", "0.9",
            ),
            Figure("the same with `convert.verify`", "verified_over_decoded", None, "verified_over_decoded"),
        ),
        ("--copies", "1", "--repeats", "1"),
        SHARED,
    ),
    "converters": Benchmark(
        ("converters.py", "--formats", "coco", "jsonl"),
        (Figure("annotations of COCO, boxes per core-second", "coco.boxes_per_s", 32_900),),
        ("--formats", "coco", "--num-images", "50", "--num-boxes", "500", "--repeats", "1"),
    ),
    "packing": Benchmark(
        ("packing.py",),
        (Figure("fill of packs, the worst stream", "fill", 0.986), Figure("fill of padded rows", "fill_padded")),
        needs=SHARED,
    ),
    "class list": Benchmark(
        ("class_scores.py", DATA),
        (
            Figure("80 classes over captions", "ratio_80", 0.055, "ratio_80"),
            Figure("1,203 classes over captions", "ratio_1203", 1.77, "ratio_1203"),
        ),
        needs=SHARED,
    ),
    "answers' loss": Benchmark(
        ("lm_loss.py", "--sizes", "1024", "2048", "151936", "--cases", "bfloat16 trained"),
        (
            Figure("loss in chunks over full logits, time", "lm_loss_time_ratio", 1.07, "lm_loss_time_ratio"),
            Figure("loss in chunks over full logits, memory", "lm_loss_memory_ratio", 0.07, "lm_loss_memory_ratio"),
        ),
        ("--sizes", "64", "32", "512", "--cases", "float32 trained"),
    ),
}  # fmt: skip


def value_at(report: Mapping[str, Any], place: str) -> float:
    """Return the number at a place such as `start_s.new`; KeyError if there is none."""
    found: Any = report
    for name in place.split("."):
        found = found[name]
    return float(found)


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Run a script and return the JSON of its last line; RuntimeError if it fails."""
    command = [sys.executable, str(FOLDER / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def lines_of(
    benchmark: Benchmark, figures: Mapping[str, Mapping[str, Value]], arguments: Sequence[str]
) -> dict[str, str]:
    """Return the table's line of each figure."""
    day = time.strftime("%d %B %Y").lstrip("0")
    lines = {}
    for figure in benchmark.figures:
        numbers = [figures[figure.what][name] for name in ("today", "reached", "ratio")]
        cells = ["-" if number is None else f"{number:.4g}" for number in numbers]
        command = f"`{' '.join(arguments)}`"
        lines[figure.what] = f"| {' | '.join([figure.what, *cells, figure.asked or '-', command, day])} |"
    return lines


def with_lines(text: str, lines: Mapping[str, str]) -> str:
    """Return a document with these lines in the table between the marks; all others stay.

    Raises:
        ValueError: The marks are missing.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the table's place is not marked: it needs one line {BEGIN} and, after it, one line {END}")
    head, rest = text.split(BEGIN)
    table, tail = rest.split(END)
    rows = {line.split("|")[1].strip(): line for line in table.strip().splitlines()[2:]}
    rows |= lines
    rule = "| --- |" + " ---: |" * 4 + " --- | --- |"
    return "\n".join([f"{head}{BEGIN}", "", f"| {' | '.join(HEADER)} |", rule, *rows.values(), "", f"{END}{tail}"])


def missing(names: Iterable[str]) -> list[str]:
    """Return what is missing, in sentences."""
    wanted = {need for name in names for need in BENCHMARKS[name].needs}
    return [f"{path} is missing: {remedy}" for path, remedy in sorted(wanted) if not (ROOT / path).exists()]


def convergence() -> dict[str, Any] | None:
    """Return the figures of the full convergence that are stored; None without any."""
    try:
        return run(["convergence.py", "--variants", "--from-results", "--accept-other-commits"])
    except RuntimeError as error:
        print(f"convergence: nothing is read, {error}", flush=True)
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, write and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*BENCHMARKS, "convergence"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, help="default tests/benchmarks/RESULTS.md")
    args = parser.parse_args(arguments)
    if args.quick and args.results is None:
        parser.error("--quick measures nothing: give it a file of its own with --results")
    chosen = [name for name in BENCHMARKS if name in args.only]
    if args.quick:
        chosen = [name for name in chosen if BENCHMARKS[name].quick is not None]
    if problems := missing(chosen):
        parser.error("; ".join(problems) + ", or choose others with --only")
    path = args.results or FOLDER / "RESULTS.md"
    with_lines(path.read_text(), {})  # fails now if it cannot be written
    report: dict[str, Any] = {}
    failed = []
    for name in chosen:
        benchmark = BENCHMARKS[name]
        own = benchmark.arguments(args.quick)
        start = time.perf_counter()
        try:
            made = run(own)
            figures = {figure.what: figure.read(made) for figure in benchmark.figures}
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            failed.append(name)
            print(f"{name} failed: {error}", flush=True)
            continue
        print(f"{name}, {time.perf_counter() - start:.0f} s: {json.dumps(figures)}", flush=True)
        report |= figures
        path.write_text(with_lines(path.read_text(), lines_of(benchmark, figures, own)))
    if "convergence" in args.only and not args.quick:
        report["convergence"] = convergence()
    if failed:
        print(f"failed: {', '.join(failed)}; run its script alone to see why", file=sys.stderr)
    print(json.dumps(report))
    sys.exit(int(bool(failed)))


if __name__ == "__main__":
    main()
