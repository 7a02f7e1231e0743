"""Find where in its training a run is, or was when it was killed, by nothing but the files it leaves."""

import json
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.drills.drill_cases import EVALUATE_EVERY

START, STEP, EVALUATION, CHECKPOINT = "start", "step", "evaluation", "checkpoint"
File = tuple[str, int]  # name and time of its last change
TAIL = 1 << 14  # bytes, which hold the metrics of a step


@dataclass(frozen=True)
class Moment:
    """A phase, and the batch it belongs to, the first being 1."""

    phase: str
    batch: int


def moment_of(run_folder: Path, started: float, leftovers: Set[File] = frozenset()) -> Moment:
    """Return the moment of one launch.

    Args:
        run_folder: Of the run.
        started: When the launch began, on the clock of `time.time`.
        leftovers: Of `unfinished` at that time.
    """
    entry = last_entry(run_folder / "metrics.jsonl")
    if entry is None or entry["time"] < started:
        return Moment(START, 0)
    step = entry["step"]
    if entry["in_batch"] and "loss/train/total" not in entry["metrics"]:
        return Moment(STEP, step + 1)
    batch = step + 1 if entry["in_batch"] else step  # finished
    if unfinished(run_folder / "checkpoints") - leftovers:
        return Moment(CHECKPOINT, batch)
    is_evaluated = not entry["in_batch"] or batch % EVALUATE_EVERY > 0
    return Moment(STEP, batch + 1) if is_evaluated else Moment(EVALUATION, batch)


def unfinished(checkpoints: Path) -> Set[File]:
    """Return what is being written, and checkpoints without manifest, which comes after them and goes before them."""
    times: dict[str, int] = {}
    for path in checkpoints.glob("*"):
        with suppress(FileNotFoundError):  # renamed or removed meanwhile
            times[path.name] = path.stat().st_mtime_ns
    without = {name for name in times if name.endswith(".pt") and f"{name}.manifest.json" not in times}
    partial = {name for name in times if name.endswith(".partial")}
    return {(name, times[name]) for name in partial | without - {"latest-rank0.pt"}}


def last_entry(path: Path) -> dict[str, Any] | None:
    """Return the last whole line."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().split(b"\n")[1 if path.stat().st_size > TAIL else 0 : -1]
    return json.loads(lines[-1]) if lines else None


def losses(run_folder: Path) -> list[tuple[int, float]]:
    """Return the total loss of every batch, in the order of the file."""
    rows = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["metrics"]["loss/train/total"]) for row in rows if "loss/train/total" in row["metrics"]]


def first_step(run_folder: Path, started: float) -> int | None:
    """Return the batches that were done when a launch began to train."""
    for name in ("metrics.jsonl.replaced", "metrics.jsonl"):
        path = run_folder / name
        rows = map(json.loads, path.read_text().splitlines()) if path.exists() else []
        steps = [row["step"] for row in rows if row["time"] >= started]
        if steps:
            return steps[0]
    return None
