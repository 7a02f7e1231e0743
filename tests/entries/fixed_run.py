"""Make one fixed training run of the tiny model and write down every number it computed, to show that no bit changed.

    python tests/entries/fixed_run.py --out before.json --root OLD_CHECKOUT
    python tests/entries/fixed_run.py --out after.json                    # this checkout
    python tests/entries/fixed_run.py --out resumed.json --resume-at 20   # stopped by SIGTERM and continued
    python tests/entries/fixed_run.py --compare before.json after.json    # names differences, then exits 1

The run is small but takes the paths that numbers depend on: packs with teachers, microbatches, two stages, dropout,
denoising queries, averaged weights, two evaluations with generated answers and captions. It uses a checkout's commands
only, so that checkouts with different modules can be compared. Compare runs of one machine: bits differ between CPUs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
TINY_BUILDERS = ("recipe/tiny.py", "recipe/models/tiny.py")  # the first that the checkout has
SCENES = ("--image-size", "84", "--max-objects", "3")
SPLITS = {"train": (96, 1), "val": (12, 2)}  # name: (scenes, seed)
STEPS = 60
LATEST = "checkpoints/latest-rank0.pt"
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",  # on the CPU, whatever the machine has
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # sums are in the order of one thread
    "TOKENIZERS_PARALLELISM": "false",
}
# Beginnings of the names of metrics that depend on the clock or the machine.
NOT_COMPUTED = ("eval/seconds/", "throughput/", "time/remaining", "wall_clock/", "memory/", "system/")

# Complete, so that a change of `yamls/` changes nothing here. Switches are those an outside user may rely on.
CONFIG: Mapping[str, Any] = {
    "seed": 17,
    "max_seq_len": 640,
    "model": {"pretrained_model_name_or_path": "tiny"},
    "detection_head": {"num_queries": 8, "num_heads": 4, "num_layers": 2, "dropout": 0.1, "num_denoising_groups": 2},
    "caption_decoder": {"num_layers": 1, "num_heads": 4, "dropout": 0.1, "max_caption_tokens": 8},
    "prompt": {"system": "", "detect": "Detect."},
    "teachers": {"stream": {"local": "data/teachers"}, "num_teachers": 2, "teacher_ratio": 0.5},
    "train_loader": {
        "streams": {"shapes": {"local": "data", "split": "train"}},
        "global_batch_size": 2,
        "collator": "packed",
        "packing": {"max_tokens": 640, "window": 32},
        "dataset": {"shuffle": True, "num_canonical_nodes": 1},
        "dataloader": {"num_workers": 0},
    },
    "eval_loader": {
        "streams": {"shapes": {"local": "data", "split": "val"}},
        "global_batch_size": 6,
        "dataloader": {"num_workers": 0},
    },
    "evaluation": {"max_new_tokens": 64, "score_threshold": 0.1, "num_logged_images": 1},
    "loss": {"objectness": "mal", "weight_lm_teacher": 1.0, "weight_lm_student": 2.0},
    "optimizer": {  # high, so that after 60 steps answers are lists of boxes
        "lr_vision": 3e-3,
        "lr_merger": 8e-3,
        "lr_llm": 8e-3,
        "lr_adapter": 2e-3,
        "lr_detection": 2e-3,
    },
    "scheduler": {"t_warmup": "5ba", "alpha_f": 0.3},
    "staged_freezing": {
        "groups": {
            "vision": [{"from": "0ba", "lr": "frozen"}, {"from": "35ba", "lr": 1.0}],
            "llm": [{"from": "35ba", "lr": 0.8}],
        }
    },
    "ema": {"half_life": "10ba"},
    "nan_rollback": {"snapshot_interval": "10ba"},
    "trainer": {
        "max_duration": f"{STEPS}ba",
        "eval_interval": f"{STEPS // 2}ba",
        "save_interval": f"{STEPS}ba",
        "device_train_microbatch_size": 1,
        "precision": "fp32",
        "progress_bar": False,
    },
    "callbacks": {
        "group_metrics": {"interval": "5ba"},
        "loss_shares": {},
        "loss_gradients": {"interval": "20ba"},
    },
    "loggers": {"json_lines": {}},
}

# Sections that put adapters on the trunk, their dropout on, and give them its rates and stages.
ADAPTED: Mapping[str, Any] = {
    "lora": {"llm": {"rank": 4, "dropout": 0.1}, "vision": {"rank": 4, "dora": True}},
    "optimizer": {
        **{"lr_vision": 0.0, "lr_lora_vision": 1e-2, "lr_merger": 8e-3, "lr_llm": 0.0, "lr_lora_llm": 1e-2},
        **{"lr_adapter": 2e-3, "lr_detection": 2e-3},
    },
    "staged_freezing": {
        "groups": {f"lora_{group}": stages for group, stages in CONFIG["staged_freezing"]["groups"].items()}
    },
}


def make_inputs(folder: Path, root: Path = ROOT) -> None:
    """Write the scenes, the pool of teachers and the tiny checkpoint below `folder`, by the commands of `root`."""
    for split, (num_samples, seed) in SPLITS.items():
        scenes = ("--out", "data", "--split", split, "--num-samples", str(num_samples), "--seed", str(seed), *SCENES)
        run(folder, root, "-m", "convert.shapes", *scenes)
    # Out of the training set, so that some samples would be their own teachers.
    pool = ("--local", "data", "--split", "train", "--out", "data/teachers", "--num-samples", "12")
    run(folder, root, "-m", "convert.teachers", *pool)
    builder = next(path for path in TINY_BUILDERS if (root / path).exists())
    module = builder.removesuffix(".py").replace("/", ".")
    run(folder, root, "-m", module, "--out", "tiny", "--hidden-size", "64", "--num-layers", "2")


def train(
    folder: Path,
    name: str,
    root: Path = ROOT,
    resume_at: int | None = None,
    seed: int = 17,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Train as `CONFIG` says and return what was computed; see `read_run`.

    Args:
        folder: Holds what `make_inputs` made; gets the run's folder.
        name: Of the run's folder.
        root: The checkout whose code runs.
        resume_at: Stop by SIGTERM once this step has begun, then give the same command again.
        seed: Of the run.
        changes: Sections instead of those of `CONFIG`.

    Raises:
        RuntimeError: A command failed, or the run ended before it could be stopped.
    """
    yaml = folder / f"{name}.yaml"
    yaml.write_text(json.dumps({**CONFIG, **changes, "seed": seed, "run_folder": name}))  # JSON is YAML
    command = (str(root / "recipe" / "train.py"), yaml.name)
    if resume_at is not None:
        stop_at(folder, name, root, command, resume_at)
    run(folder, root, *command)
    return read_run(folder / name)


def stop_at(folder: Path, name: str, root: Path, command: tuple[str, ...], step: int) -> None:
    """Start a run and stop it by SIGTERM once `step` has begun: it ends with the next checkpoint it can write."""
    process, log = start(folder, root, command)
    metrics = folder / name / "metrics.jsonl"
    while process.poll() is None and all(line["step"] + 1 < step for line in complete_lines(metrics)):
        time.sleep(0.05)
    process.terminate()
    process.wait()
    done = max((line["step"] for line in complete_lines(metrics)), default=0)
    if not step <= done < STEPS or not (folder / name / LATEST).exists():
        raise RuntimeError(f"no checkpoint between step {step} and the end; step {done}:\n{log.read_text()[-4000:]}")
    print(f"stopped by SIGTERM after step {done}", flush=True)


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines that are written so far; the run may be in the middle of one."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def run(folder: Path, root: Path, *command: str) -> None:
    """Run one of the checkout's commands in `folder`.

    Raises:
        RuntimeError: It failed.
    """
    process, log = start(folder, root, command)
    if process.wait():
        raise RuntimeError(f"{' '.join(command)} exited with {process.returncode}:\n{log.read_text()[-4000:]}")


def start(folder: Path, root: Path, command: tuple[str, ...]) -> tuple[subprocess.Popen[bytes], Path]:
    """Start Python with the arguments `command`; return the process and the file of its output."""
    log = folder / "output.txt"
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(root)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    return process, log


def read_run(folder: Path) -> dict[str, Any]:
    """Return what a run computed: `metrics`, and by name the `weights` and the `optimizer` of its last checkpoint.

    Of metrics only name, step and value count, not the lines that they were logged in. Tensors are given by digests.
    """
    steps: dict[tuple[int, bool], dict[str, list[Any]]] = {}
    for line in complete_lines(folder / "metrics.jsonl"):
        for name, value in line["metrics"].items():
            if not name.startswith(NOT_COMPUTED):
                steps.setdefault((line["step"], line["in_batch"]), {}).setdefault(name, []).append(value)
    metrics = [{"step": step, "in_batch": in_batch, **values} for (step, in_batch), values in sorted(steps.items())]
    checkpoint = torch.load(folder / LATEST, map_location="cpu", weights_only=False)
    state = checkpoint["state"]
    return {
        "metrics": metrics,
        "weights": dict(flatten(state["model"])),
        "optimizer": dict(flatten(state["optimizers"])),
    }


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of nested dicts and lists with the path to it; of a tensor its digest."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{name}/{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from flatten(item, f"{name}/{position}")
    else:
        yield name, digest(value) if isinstance(value, torch.Tensor) else value


def digest(tensor: torch.Tensor) -> str:
    """Return dtype, shape and the SHA-256 of a tensor's bytes."""
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}"


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return one line for each number that two runs do not have in common, metrics in the order of steps."""
    parts = [dict(by_name(run)) for run in (first, second)]
    names = [*parts[0], *(name for name in parts[1] if name not in parts[0])]
    shown = [[str(part.get(name, "absent")) for part in parts] for name in names]
    return [f"{name}: {a} | {b}" for name, (a, b) in zip(names, shown, strict=True) if a != b]


def by_name(run: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every number of a run with a name that occurs once."""
    for line in run["metrics"]:
        place = f"step {line['step']}{' in batch' if line['in_batch'] else ''}"
        for name, values in line.items():
            if name not in ("step", "in_batch"):
                yield f"{place}, {name}", values
    for part in ("weights", "optimizer"):
        for name, value in run[part].items():
            yield f"{part} {name}", value


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout whose code runs; default: this one")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="JSON file to write")
    action.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two such files")
    parser.add_argument("--resume-at", type=int, help=f"stop once this step has begun (1 to {STEPS - 10}), then resume")
    args = parser.parse_args()
    if args.resume_at is not None and not 0 < args.resume_at <= STEPS - 10:
        parser.error(f"--resume-at is {args.resume_at}: give a step from 1 to {STEPS - 10}")
    if args.compare:
        differences = compare(*(json.loads(path.read_text()) for path in args.compare))
        print("\n".join(differences) or "no difference")
        sys.exit(bool(differences))
    with TemporaryDirectory() as folder:
        begin = time.monotonic()
        make_inputs(Path(folder), args.root.resolve())
        made = time.monotonic()
        found = train(Path(folder), "run", args.root.resolve(), args.resume_at)
        print(f"inputs {made - begin:.0f} s, training {time.monotonic() - made:.0f} s")
    args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
