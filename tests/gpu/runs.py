"""Run the whole of `recipe.train` with the tiny model: FSDP2 on one GPU; precision, memory and waits in the Trainer."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from composer import Callback, Logger, State
from composer.utils import dist
from safetensors.torch import load_file

from convert.shapes import iter_samples
from convert.write import write_split
from recipe import export, train
from recipe.callbacks import table
from recipe.checkpoints.weights import HEAD_FILE
from recipe.config import LoaderConfig, OptimizerConfig, PackingConfig, RecipeConfig
from tests.distributed import fsdp_run, fsdp_shim
from tests.distributed.fsdp_run import Leg
from tests.gpu.session import Session, rounded
from tests.gpu.steps import counting_waits
from tests.support.float64 import compute_in_float64
from tests.support.tiny_cases import build_checkpoint, make_config

STEPS = 30
BAND = 0.1  # by which a step's loss in bfloat16 may differ from that in float32, relative to it; a guess: not run yet
RESUMED = 1e-9  # by which the weights of a resumed run in float64 may differ, relative norm


def make_data(session: Session) -> tuple[str, str]:
    """Return the folders of a tiny checkpoint and of the split `train`, made once for all parts."""
    checkpoint, data = session.folder / "tiny", session.folder / "data"
    if not data.exists():
        build_checkpoint(str(checkpoint))
        write_split(iter_samples(num_samples=24, seed=11, image_size=84), str(data), "train")
    return str(checkpoint), str(data)


def fsdp(session: Session) -> None:
    """Train under FSDP2 in float64, save, resume and export; the resumed run must end with the weights of a whole one.

    On a CPU with the tests' patches of Composer and torch.
    """
    compute_in_float64()
    dist.initialize_dist(session.composer_device())
    fsdp_shim.install()
    table.CALLBACKS = {**table.CALLBACKS, "recorder": fsdp_run.Recorder}
    checkpoint, data = make_data(session)
    start = session.now()
    whole, begun, resumed = (str(session.folder / f"fsdp-{name}") for name in ("whole", "begun", "resumed"))
    fsdp_run.run(Leg(checkpoint, data, whole, "fsdp2"))
    fsdp_run.run(Leg(checkpoint, data, begun, "fsdp2", steps=3))
    shutil.copytree(begun, resumed, symlinks=True)
    fsdp_run.run(Leg(checkpoint, data, resumed, "fsdp2"))
    expected, found = (torch.load(Path(folder, "0.pt"), weights_only=False)["weights"] for folder in (whole, resumed))
    worst = max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items() if value.any())
    out = session.folder / "fsdp-exported"
    export.main(export.parse(["--checkpoint", f"{resumed}/checkpoints/latest-rank0.pt", "--out", str(out)]))
    exported = load_file(out / HEAD_FILE)
    head = {name.removeprefix("model."): value.cpu() for name, value in found.items() if ".vlm." not in name}
    same = exported.keys() == head.keys() and all(torch.equal(exported[name], value) for name, value in head.items())
    session.report(
        "fsdp2",
        resumed_error=rounded(worst, 2),
        exported_head_equals_the_run=same,
        seconds=rounded(session.now() - start),
    )
    assert worst <= RESUMED, f"the resumed run differs by {worst:.1e}"
    assert same, "the export differs from the run"


class CountWaits(Callback):
    """Counts the host's waits for the GPU, from the start of a step to its end."""

    def __init__(self):
        self.steps: list[Counter[str]] = []
        self._counting: Any = None

    def batch_start(self, state: State, logger: Logger) -> None:
        """Begin."""
        if state.device.name == "gpu":
            self.steps.append(Counter())
            self._counting = counting_waits(self.steps[-1])
            self._counting.__enter__()

    def batch_end(self, state: State, logger: Logger) -> None:
        """End; callbacks that come later are not counted."""
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._counting = None


def run_config(session: Session, checkpoint: str, data: str, name: str, precision: str) -> RecipeConfig:
    """Return a run of the tiny model, packed, with weights in float32."""
    stream = {"main": {"local": data, "split": "train"}}
    rate = dict.fromkeys(("lr_vision", "lr_merger", "lr_llm", "lr_adapter", "lr_detection"), 1e-3)
    return replace(
        make_config(checkpoint, model={"dtype": "float32"}),
        run_folder=str(session.folder / f"trainer-{name}"),
        train_loader=LoaderConfig(
            streams=stream,
            global_batch_size=2,
            collator="packed",
            packing=PackingConfig(max_tokens=512),
            dataset={"num_canonical_nodes": 1},
        ),
        eval_loader=LoaderConfig(streams=stream, global_batch_size=8),
        optimizer=OptimizerConfig(**rate),
        callbacks={
            "count_waits": {},
            "memory_monitor": {} if session.is_cuda else None,
            "throughput": {"interval": "10ba"},
            "speed_monitor": {"window_size": 10},
        },
        loggers={"json_lines": {}},
        trainer={
            "max_duration": f"{STEPS}ba",
            "eval_interval": 0,
            "save_folder": None,
            "precision": precision,
            "progress_bar": False,
        },
    )


def trainer(session: Session) -> None:
    """Train the tiny model in amp_bf16 and in float32; report both curves, the memory monitor's figures and the waits.

    On a CPU, where Composer has no amp_bf16, both are float32.
    """
    checkpoint, data = make_data(session)
    table.CALLBACKS = {**table.CALLBACKS, "count_waits": CountWaits}
    curves: dict[str, list[float]] = {}
    for name, precision in (("fp32", "fp32"), ("amp_bf16", session.precision)):
        start = session.now()
        done = train.main(run_config(session, checkpoint, data, name, precision))
        counted = next(callback for callback in done.state.callbacks if isinstance(callback, CountWaits))
        done.close()
        rows = read_rows(session.folder / f"trainer-{name}" / "metrics.jsonl")
        curves[name] = [row["loss/train/total"] for row in rows if "loss/train/total" in row]
        session.report(
            f"trainer {name}",
            first=rounded(curves[name][0], 4),
            last=rounded(curves[name][-1], 4),
            seconds=rounded(session.now() - start),
            **waits_of(counted),
            **{key: rounded(value) for key, value in rows[-1].items() if key.startswith(("memory/", "data/stall"))},
        )
    pairs = list(zip(curves["amp_bf16"], curves["fp32"], strict=True))
    worst = max(abs(half - whole) / whole for half, whole in pairs)
    session.report("bf16_beside_fp32", steps=len(pairs), worst=rounded(worst), band=BAND)
    assert len(pairs) == STEPS and all(math.isfinite(value) for pair in pairs for value in pair)
    assert worst <= BAND, f"a step's loss in amp_bf16 differs by {worst:.1%} from float32"


def waits_of(counted: CountWaits) -> dict[str, Any]:
    """Return the median number of waits per step, after the first ten, and where most are."""
    later = counted.steps[10:]
    if not later:
        return {"waits_per_step": None}
    places = sum(later, Counter[str]())
    where = {place: rounded(count / len(later)) for place, count in places.most_common(8)}
    return {"waits_per_step": median(found.total() for found in later), "waits_where": where}


def read_rows(path: Path) -> list[dict[str, float]]:
    """Return the logged metrics, one dict per step."""
    rows: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        rows.setdefault(entry["step"], {}).update(entry["metrics"])
    return [row for _, row in sorted(rows.items())]
