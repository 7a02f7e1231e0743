"""Where in its training a run is, or was when it was killed, by nothing but the files it leaves."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.drills.drill_cases import EVALUATE_EVERY, SAVE_EVERY

START, STEP, EVALUATION, CHECKPOINT = "start", "step", "evaluation", "checkpoint"
TAIL = 1 << 14  # bytes, which hold the metrics of a step


@dataclass(frozen=True)
class Moment:
    """A phase, and the batch it belongs to, the first being 1."""

    phase: str
    batch: int


def moment_of(run_folder: Path, started: float) -> Moment:
    """Of the launch that began at `started`, on the clock of `time.time`."""
    entry = last_entry(run_folder / "metrics.jsonl")
    if entry is None or entry["time"] < started:
        return Moment(START, 0)
    step, metrics = entry["step"], entry["metrics"]
    if entry["in_batch"] and "loss/train/total" not in metrics:
        return Moment(STEP, step + 1)
    batch = step + 1 if entry["in_batch"] else step  # finished
    checkpoints = run_folder / "checkpoints"
    if is_half_written(checkpoints):
        return Moment(CHECKPOINT, batch)
    if entry["in_batch"] and batch % EVALUATE_EVERY == 0:
        return Moment(EVALUATION, batch)
    is_due = batch % SAVE_EVERY == 0 and not (checkpoints / f"ba{batch}.pt.manifest.json").exists()
    return Moment(CHECKPOINT, batch) if is_due else Moment(STEP, batch + 1)


def is_half_written(checkpoints: Path) -> bool:
    """Whether any file is being written, or any checkpoint lacks its manifest, as before it comes and after it goes."""
    names = {path.name for path in checkpoints.glob("*")}
    whole = {name.removesuffix(".manifest.json") for name in names if name.endswith(".manifest.json")}
    weights = {name for name in names if name.endswith(".pt")} - {"latest-rank0.pt"}
    return any(name.endswith(".partial") for name in names) or bool(weights - whole)


def last_entry(path: Path) -> dict[str, Any] | None:
    """The last whole line."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().split(b"\n")[1 if path.stat().st_size > TAIL else 0 : -1]
    return json.loads(lines[-1]) if lines else None


def losses(run_folder: Path) -> list[tuple[int, float]]:
    """The total loss of every batch, in the order of the file."""
    rows = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["metrics"]["loss/train/total"]) for row in rows if "loss/train/total" in row["metrics"]]


def first_step(run_folder: Path, started: float) -> int | None:
    """Batches that were done when a launch began to train."""
    for name in ("metrics.jsonl.replaced", "metrics.jsonl"):
        path = run_folder / name
        rows = map(json.loads, path.read_text().splitlines()) if path.exists() else []
        steps = [row["step"] for row in rows if row["time"] >= started]
        if steps:
            return steps[0]
    return None
