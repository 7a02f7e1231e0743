"""Measure start and training step of the quickstart, against an older build of this repository.

    python tests/benchmarks/build_speed.py --baseline TREE_OR_COMMIT [--repeats 5] [--steps 30]

Start: CPU seconds of a rank process up to its first step, above the import of torch, Composer, Streaming and
transformers; without W&B, whose import takes half a second in any build, and with it. Step: CPU milliseconds per step
of 8 scenes, at the settings of both builds and as `yamls/quickstart.yaml` is today. Each run is a process of its own
with one thread, on files that were read before. This build and the older one take turns; medians count. Every build
converts the same scenes with its own converter. The last line is JSON.
"""

import argparse
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SPLITS = {"train": (1500, 1), "val": (32, 2), "pool": (200, 3)}  # name: (scenes, seed)
WARM_UP = 5  # steps that are not timed
RUN = (
    "trainer.device=cpu", "trainer.save_folder=null", "trainer.progress_bar=false", "autoresume=false",
    "train_loader.global_batch_size=8",
)  # fmt: skip
RATES = [f"optimizer.lr_{group}=1e-3" for group in ("vision", "merger", "llm", "adapter", "detection")]
# What commit 2d61bb2 has too: no pyramid, queries learned alone.
AS_BEFORE = [
    "detection_head.width=null", "detection_head.num_denoising_groups=4", "detection_head.multi_scale=false",
    "detection_head.select_queries=false", *RATES,
]  # fmt: skip
Result = dict[str, Any]


def work(tree: str, num_steps: int, overrides: list[str]) -> None:
    """Run a build's `recipe/train.py` in this process and print what it took as JSON."""
    import composer
    import streaming  # noqa: F401  (only imported)
    import torch
    import transformers  # noqa: F401
    from composer.core import Engine, Event

    imported = time.process_time()
    torch.set_num_threads(1)
    begun: list[float] = []  # CPU seconds at the start of each step
    losses: list[float] = []
    run_event = Engine.run_event

    def timed(engine: Any, event: Any) -> Any:
        if Event(event) is Event.BATCH_START:
            begun.append(time.process_time())
        if Event(event) is Event.AFTER_LOSS:
            losses.append(float(engine.state.loss["total"].detach()))
        return run_event(engine, event)

    Engine.run_event = timed  # type: ignore[method-assign]
    composer.Trainer._run_evaluators = lambda *args, **kwargs: None
    with tempfile.TemporaryDirectory() as folder:
        durations = [f"trainer.max_duration={num_steps}ba", f"trainer.eval_interval={num_steps}ba"]
        sys.argv = ["train.py", f"{tree}/yamls/quickstart.yaml", f"run_folder={folder}", *RUN, *durations, *overrides]
        runpy.run_path(f"{tree}/recipe/train.py", run_name="__main__")
    steps = [after - before for before, after in zip(begun[WARM_UP:], begun[WARM_UP + 1 :], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps({
            "start_s": begun[0] - imported,
            "step_ms": 1000 * median(steps) if steps else None,
            "loss": mean(losses[-10:]),
            "peak_mib": peak,
        })
    )  # fmt: skip


def environment(tree: Path) -> dict[str, str]:
    """Return the environment of a build's process, which may keep its bytecode as a user's does."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    return {**kept, **quiet, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tree)}


@contextmanager
def older_build(baseline: str) -> Iterator[Path]:
    """Yield the folder of an older build: `baseline` itself, or a worktree of that commit until the end."""
    if Path(baseline).is_dir():
        yield Path(baseline).absolute()
        return
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name, "tree")
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), baseline], cwd=ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def make_data(tree: Path, folder: Path) -> None:
    """Write the scenes, teachers and checkpoint of the quickstart with a build's own commands."""

    def run(*arguments: str) -> None:
        subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=folder,
            env=environment(tree),
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    folder.mkdir(parents=True)
    data = "quickstart/data"
    for split, (num_samples, seed) in SPLITS.items():
        scenes = f"--num-samples {num_samples} --seed {seed} --image-size 112 --max-objects 3".split()
        run("convert.shapes", "--out", data, "--split", split, *scenes)
    run("convert.teachers", "--local", data, "--split", "pool", "--out", f"{data}/teachers", "--num-samples", "128")
    tiny = "recipe.tiny" if (tree / "recipe" / "tiny.py").exists() else "recipe.models.tiny"
    run(tiny, "--out", "quickstart/tiny")


def measure(tree: Path, folder: Path, num_steps: int, overrides: list[str]) -> Result:
    """Return what one run of a build took."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--worker",
        str(tree),
        "--steps",
        str(num_steps),
        *overrides,
    ]
    done = subprocess.run(command, cwd=folder, env=environment(tree), capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"start_s"')]
    if done.returncode or not lines:
        raise RuntimeError(f"the run of {tree} failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[0])


def compare(builds: dict[str, Path], folder: Path, repeats: int, num_steps: int) -> dict[str, Result]:
    """Measure all kinds of runs of the builds in turns; return each figure of each build, a median, and their ratio."""
    has_pyramid = {name: "multi_scale" in (tree / "recipe" / "config.py").read_text() for name, tree in builds.items()}
    same = {name: AS_BEFORE if has_pyramid[name] and not all(has_pyramid.values()) else RATES for name in builds}
    kinds = {  # name: (steps, overrides by build)
        "start": (1, {name: ["loggers.wandb=null"] for name in builds}),
        "same_settings": (num_steps, same),
        "quickstart": (num_steps, {name: [] for name in builds}),
    }
    runs: dict[str, dict[str, list[Result]]] = {kind: {name: [] for name in builds} for kind in kinds}
    for repeat in range(-1, repeats):  # the first warms up
        for kind, (steps, overrides) in kinds.items():
            for name, tree in builds.items():
                if repeat < 0 and kind != "start":
                    continue
                found = measure(tree, folder / name, steps, overrides[name])
                print(kind, name, json.dumps(found), flush=True)
                if repeat >= 0:
                    runs[kind][name].append(found)

    def row(kind: str, figure: str) -> Result:
        values = {name: median(run[figure] for run in of_build) for name, of_build in runs[kind].items()}
        return {**values, "ratio": values["new"] / values["old"]}

    return {
        "start_s": row("start", "start_s"),
        "start_with_wandb_s": row("quickstart", "start_s"),
        "step_same_settings_ms": row("same_settings", "step_ms"),
        "step_quickstart_ms": row("quickstart", "step_ms"),
        "loss_same_settings": row("same_settings", "loss"),
        "peak_mib": row("quickstart", "peak_mib"),
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", default="2d61bb2", help="folder of an older build, or its commit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.worker:
        work(args.worker, args.steps, args.overrides)
        return
    with tempfile.TemporaryDirectory() as name, older_build(args.baseline) as old:
        folder = Path(name)
        builds = {"old": old, "new": ROOT}
        for build, tree in builds.items():
            make_data(tree, folder / build)
        rows = compare(builds, folder, args.repeats, args.steps)
    print("| figure | older build | this build | ratio |\n| --- | ---: | ---: | ---: |")
    for figure, row in rows.items():
        print(f"| {figure} | {row['old']:.2f} | {row['new']:.2f} | {row['ratio']:.2f} |")
    print(json.dumps({figure: {key: round(value, 3) for key, value in row.items()} for figure, row in rows.items()}))


if __name__ == "__main__":
    main()
