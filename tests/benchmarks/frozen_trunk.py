"""Measure what yamls/head.yaml and yamls/lora.yaml reach on a trunk that a joint run has taught, next to that run.

    python tests/benchmarks/frozen_trunk.py SHARED_DATA/chess_train [--steps 500] [--seed 17]

The folder holds `images` and `instances.json`; a fifth of its images is held out. A tiny random model learns boxes and
captions jointly, as in photos.py, and is exported; its head is discarded. Then the two yamls train a new head on it, on
the same images, about eight per step as the joint run. Only the model's path, sizes and rates are overridden, and what
a CPU needs. Everything is written below `bench/frozen_trunk`. It prints the held-out AP50 by step of each run. The last
line is JSON: the curves as lists of (step, AP50), and the last AP50 of each yaml minus that of the joint run.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quickstart import ROOT, YAML, run
from real_sets import REAL, make_real_set

FOLDER = Path("bench", "frozen_trunk")
YAMLS = {"head": "yamls/head.yaml", "lora": "yamls/lora.yaml"}
AP50 = "metrics/eval/box_ap50"
# Sizes of the quickstart's model and of the images; the rates are those at which so small a head learns.
SIZES: Mapping[str, Any] = {
    "detection_head.num_queries": REAL["detection_head.num_queries"],
    "detection_head.num_denoising_groups": REAL["detection_head.num_denoising_groups"],
    "detection_head.width": "null",
    "detection_head.num_heads": 4,
    "detection_head.num_layers": 2,
    "caption_decoder.num_layers": 2,
    "caption_decoder.num_heads": 4,
    "train_loader.packing.max_tokens": 1024,
    "image.min_pixels": REAL["image.min_pixels"],
    "image.max_pixels": REAL["image.max_pixels"],
    "optimizer.lr_adapter": 2e-3,
    "optimizer.lr_detection": 2e-3,
}
# With answers, which adapters learn, a sample has up to 1,158 tokens.
OWN = {"head": {}, "lora": {"optimizer.lr_lora_llm": 2e-3, "train_loader.packing.max_tokens": 2048}}
ON_A_CPU: Mapping[str, Any] = {
    "trainer.precision": "fp32",
    "trainer.device": "cpu",
    "train_loader.dataloader.num_workers": 1,
    "eval_loader.dataloader.num_workers": 0,
    "evaluation.answers": "null",
    "loggers": "{json_lines: {}}",
}


def curve(folder: Path) -> list[tuple[int, float]]:
    """Return the held-out AP50 of a run by step."""
    rows = map(json.loads, (ROOT / folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], round(row["metrics"][AP50], 4)) for row in rows if AP50 in row["metrics"]]


def train(yaml: str, folder: Path, name: str, steps: int, settings: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Train below `folder` for `steps`, with an evaluation each tenth of them; return its curve."""
    trainer = {"max_duration": f"{steps}ba", "eval_interval": f"{steps // 10}ba", "save_interval": f"{steps}ba"}
    values = {
        **{f"trainer.{key}": value for key, value in trainer.items()},
        "run_folder": folder / name,
        **settings,
    }
    run("composer", "-n", "1", "recipe/train.py", yaml, *(f"{key}={value}" for key, value in values.items()))
    return curve(folder / name)


def joint_settings(folder: Path, seed: int) -> dict[str, Any]:
    """Return what the joint run on the set in `folder` changes in yamls/quickstart.yaml."""
    return {
        "seed": seed,
        "model.pretrained_model_name_or_path": folder / "tiny",
        "train_loader.streams.shapes.local": folder,
        "eval_loader.streams.shapes.local": folder,
        "teachers": "{stream: null, num_teachers: 0}",
        "prompt.student_answer": "false",
        "evaluation.answers": "null",
        "caption_decoder": "{num_layers: 2, max_caption_tokens: null}",
        **REAL,
    }


def main() -> None:
    """Run everything and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of `images` and `instances.json`")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=17)
    args = parser.parse_args()
    folder = FOLDER / args.source.name / str(args.seed)
    shutil.rmtree(ROOT / folder, ignore_errors=True)
    make_real_set(args.source, ROOT / folder, args.seed)
    curves = {"joint": train(YAML, folder, "joint", args.steps, joint_settings(folder, args.seed))}
    checkpoint = str(folder / "joint" / "checkpoints" / "latest-rank0.pt")
    run("python", "recipe/export.py", "--checkpoint", checkpoint, "--out", str(folder / "exported"))
    for name, yaml in YAMLS.items():
        settings = {
            "seed": args.seed,
            "model.pretrained_model_name_or_path": folder / "exported",
            "detection_head.pretrained": "false",
            "train_loader.streams.main.local": folder,
            "eval_loader.streams.main.local": folder,
            **SIZES,
            **OWN[name],
            **ON_A_CPU,
        }
        curves[name] = train(yaml, folder, name, args.steps, settings)
    for name, points in curves.items():
        print(f"{name:<6}", "  ".join(f"{step}: {value:.2f}" for step, value in points))
    last = {name: points[-1][1] for name, points in curves.items()}
    behind = {name: round(last[name] - last["joint"], 4) for name in YAMLS}
    print(json.dumps({"curves": curves, "ap50_beyond_joint": behind}))


if __name__ == "__main__":
    main()
