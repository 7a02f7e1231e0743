"""Measure the recipe on one GPU, the most important things first, within a budget of time; see tests/gpu/run.sh.

    python tests/gpu/measure.py [--device cuda] [--size 3b] [--budget 480] [--parts NAME ...]

Each part is a process of its own, so that one that fails, hangs or breaks the GPU's context does not stop the next.
A part prints its figures as soon as it has them. One that the budget leaves too little time for is not started.
`--device cpu --size tiny` runs the same code with the tiny model, as the tests do; what needs CUDA says so.

The last line is JSON: `card`, `date`, `python`, `torch`, `transformers`, `parts` (how each ended), `figures` by name.
It is written even if parts fail; the exit status is then 1.
"""

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
INPUTS = ROOT / "bench" / "gpu"  # what wheels.sh collected


@dataclass(frozen=True)
class Part:
    """One thing to measure.

    Attributes:
        name: For `--parts`.
        place: Module of this folder and function, which takes a `Session`.
        needs: Seconds; with fewer left it is not started.
        most: Seconds, after which it is ended.
    """

    name: str
    place: str
    needs: float
    most: float


PARTS = (  # ordered by worth
    Part("machine", "machine:machine", 10, 60),
    Part("tests", "machine:gpu_tests", 25, 120),
    Part("step_head", "steps:head", 25, 90),
    Part("step_lora", "steps:lora", 25, 90),
    Part("step_full", "steps:full", 25, 90),
    Part("layouts", "steps:layouts", 25, 75),
    Part("attention", "ways:attention", 15, 45),
    Part("fsdp", "runs:fsdp", 25, 75),
    Part("trainer", "runs:trainer", 25, 90),
    Part("answering", "steps:answering", 25, 75),
    Part("losses", "ways:losses", 15, 45),
    Part("quantised", "steps:quantised", 20, 75),
)


class Budget:
    """Seconds that may still be spent, by a clock that the tests replace."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Return the seconds left, 0 at least."""
        return max(0.0, self._end - self._clock())


Launch = Callable[[Part, Part | None, float], str]


def run_parts(parts: Sequence[Part], budget: Budget, launch: Launch) -> dict[str, str]:
    """Run parts in their order while the budget lasts; return how each ended.

    `launch` gets a part, the one that follows if any, and the seconds that the part may take; it returns how it ended.
    """
    ended: dict[str, str] = {}
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        left = budget.left()
        if left < part.needs:
            ended[part.name] = "not run: out of time"
            print(f"{part.name}: not run: out of time ({left:.0f} s left, it needs {part.needs:.0f})", flush=True)
            continue
        ended[part.name] = launch(part, following, min(part.most, left))
        print(f"{part.name}: {ended[part.name]} ({left - budget.left():.0f} s)", flush=True)
    return ended


class Processes:
    """Run each part as a process; the one that follows does its imports meanwhile and then waits for a line.

    Args:
        command: Returns the command line of a part.
    """

    def __init__(self, command: Callable[[Part], Sequence[str]]):
        self._command = command
        self._waiting: dict[str, subprocess.Popen[bytes]] = {}

    def __call__(self, part: Part, following: Part | None, most: float) -> str:
        """Run a part for at most `most` seconds; return how it ended."""
        process = self._started(part)
        del self._waiting[part.name]
        if following is not None:
            self._started(following)
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError):  # it failed before
                process.stdin.write(b"\n")
                process.stdin.close()
            status = process.wait(most)
        except subprocess.TimeoutExpired:
            return f"failed: ended after {most:.0f} s"
        finally:
            end(process)
        return "done" if status == 0 else f"failed: exit status {status}"

    def close(self) -> None:
        """End what still waits."""
        for process in self._waiting.values():
            end(process)

    def _started(self, part: Part) -> "subprocess.Popen[bytes]":
        if part.name not in self._waiting:
            self._waiting[part.name] = subprocess.Popen(
                self._command(part), cwd=ROOT, env=environment(), stdin=subprocess.PIPE, start_new_session=True
            )
        return self._waiting[part.name]


def environment() -> dict[str, str]:
    """Return the environment of a part."""
    paths = [ROOT, ROOT / "tests" / "benchmarks", os.environ.get("PYTHONPATH")]
    return {
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
    }


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process, if it still runs, and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("3b", "7b", "tiny"), default="3b", help="of the model with random weights")
    parser.add_argument("--budget", type=float, default=480, help="seconds in all; default %(default)s")
    parser.add_argument("--spent", type=float, default=0, help="seconds of it that were spent before")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--inputs", type=Path, default=INPUTS, help="folder that wheels.sh filled; default %(default)s")
    parser.add_argument("--only", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_only(args: argparse.Namespace) -> None:
    """Run one part in this process; its figures go into a file of the folder."""
    from tests.gpu.session import Session

    name, folder = args.only
    (place,) = (part.place for part in PARTS if part.name == name)
    module, function = place.split(":")
    session = Session(args.device, args.size, args.inputs, Path(folder))
    work = getattr(import_module(f"tests.gpu.{module}"), function)
    if not sys.stdin.readline():  # else the part before has ended
        raise SystemExit("the measurements have ended")
    work(session)


def read_figures(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what the parts have reported so far, by name."""
    path = folder / "figures.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        found.update(json.loads(line))
    return found


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Run the parts that were asked for; print and return the report."""
    args = parse(arguments)
    budget = Budget(args.budget - args.spent)
    parts = [part for part in PARTS if part.name in args.parts]
    if args.device == "cpu":  # of unknown speed, so only the budget bounds a part
        parts = [replace(part, most=args.budget) for part in parts]
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as name:
        options = ["--device", args.device, "--size", args.size, "--inputs", str(args.inputs.resolve())]
        # Not as a file: its folder would come first on the path of imports.
        module = [sys.executable, "-m", "tests.gpu.measure", *options]
        processes = Processes(lambda part: [*module, "--only", part.name, name])
        try:
            ended = run_parts(parts, budget, processes)
        finally:
            processes.close()
        figures = read_figures(Path(name))
    machine = figures.get("machine", {})
    report = {
        **{key: machine.get(key) for key in ("card", "torch", "transformers")},
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "size": args.size,
        "seconds": round(args.budget - budget.left()),
        "parts": ended,
        "figures": figures,
    }
    print(json.dumps(report), flush=True)
    return report


if __name__ == "__main__":
    asked = parse(sys.argv[1:])
    if asked.only:
        run_only(asked)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # its processes are ended too
        sys.exit(any(how.startswith("failed") for how in main(sys.argv[1:])["parts"].values()))
