"""Run the whole line as a new user does: data, tiny checkpoint, joint training, evaluation, images.

    make quickstart        or        python tests/benchmarks/quickstart.py [--model TYPE] [key.sub=value ...]

TYPE is the family of the tiny checkpoint, as in recipe/families.py.
It prints a table. The last line is JSON: `box_ap50 caption_match text_f1 train_seconds loss_lm_teacher loss_lm_student`
(each loss: first, last) and `samples_per_s`. Everything is written below `quickstart/`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from streaming import StreamingDataset

from recipe.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("quickstart")
YAML = "yamls/quickstart.yaml"
SPLITS = {"train": (6000, 1), "val": (128, 2), "pool": (400, 3)}  # name: (scenes, seed)
LAUNCH = ("composer", "-n", "2")  # on small tensors two processes are faster than two threads
NUM_TEACHERS_POOL = 128
NUM_IMAGES = 20
SMOOTHING = 20  # steps that a "first" or "last" loss is averaged over


def run(*command: str) -> None:
    """Run one of the recipe's commands as a user would, in the repository."""
    print(f"\n$ {' '.join(command)}", flush=True)
    executable = Path(sys.executable).parent / command[0]
    # Silent: W&B prints its summary at the end of every run otherwise.
    environment = {**os.environ, "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([str(executable), *command[1:]], cwd=ROOT, check=True, env=environment)


def make_data(model: str) -> None:
    """Write scenes of coloured shapes, a pool of teachers, and the tiny checkpoint."""
    data = str(FOLDER / "data")
    for split, (num_samples, seed) in SPLITS.items():
        scenes = f"--num-samples {num_samples} --seed {seed} --image-size 112 --max-objects 3".split()
        run("python", "-m", "convert.shapes", "--out", data, "--split", split, *scenes)
    pool = ["--num-samples", str(NUM_TEACHERS_POOL)]
    run("python", "-m", "convert.teachers", "--local", data, "--split", "pool", "--out", f"{data}/teachers", *pool)
    run("python", "-m", "recipe.tiny", "--out", str(FOLDER / "tiny"), "--model", model)


def predict_images(checkpoint: str) -> None:
    """Draw the model's predictions on images of the evaluation split."""
    images = ROOT / FOLDER / "pictures"
    images.mkdir()
    rows = StreamingDataset(local=str(ROOT / FOLDER / "data"), split="val", batch_size=1)
    paths = []
    for index in range(NUM_IMAGES):
        path = images / f"{rows[index]['id']}.png"
        path.write_bytes(rows[index]["image"])
        paths.append(str(path.relative_to(ROOT)))
    out = FOLDER / "predictions"
    fitted = FOLDER / "eval" / "calibration.yaml"
    calibration = ["--calibration", str(fitted)] if (ROOT / fitted).exists() else []  # none if nothing was found
    run("python", "recipe/predict.py", "--checkpoint", checkpoint, "--out", str(out), *calibration, *paths)
    truth = ["--data", str(FOLDER / "data"), "--split", "val"]
    rows, page = str(out / "predictions.json"), str(out / "gallery.html")
    run("python", "-m", "recipe.gallery", "--predictions", rows, *truth, "--out", page)


def read_metrics() -> list[dict[str, float]]:
    """Return one dict per logged line of the training run, in order."""
    lines = (ROOT / FOLDER / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["metrics"] for line in lines]


def first_and_last(metrics: list[dict[str, float]], name: str) -> list[float]:
    """Return a loss at the start and at the end, over steps that had such tokens (else it is 0)."""
    values = [row[name] for row in metrics if row.get(name)]
    head, tail = values[:SMOOTHING], values[-SMOOTHING:]
    return [round(sum(part) / len(part), 4) for part in (head, tail)]


def main() -> None:
    """Run everything and report."""
    parser = argparse.ArgumentParser(description="Run the whole line as a new user does.")
    parser.add_argument("--model", default="qwen2_5_vl", choices=list(FAMILIES), help="default %(default)s")
    args, overrides = parser.parse_known_args()
    shutil.rmtree(ROOT / FOLDER, ignore_errors=True)
    make_data(args.model)
    start = time.monotonic()
    run(*LAUNCH, "recipe/train.py", YAML, *overrides)
    train_seconds = time.monotonic() - start
    checkpoint = str(FOLDER / "run" / "checkpoints" / "latest-rank0.pt")
    run(*LAUNCH, "recipe/eval.py", YAML, f"load_path={checkpoint}", "run_folder=quickstart/eval", *overrides)
    predict_images(checkpoint)
    scores = json.loads((ROOT / FOLDER / "eval" / "eval.json").read_text())
    metrics = read_metrics()
    samples = max(row.get("time/sample", 0) for row in metrics)
    result = {
        "box_ap50": round(scores["box_ap50"], 4),
        "caption_match": round(scores["caption_match"], 4),
        "text_f1": round(scores["text_f1"], 4),
        "train_seconds": round(train_seconds, 1),
        "loss_lm_teacher": first_and_last(metrics, "loss/train/loss_lm_teacher"),
        "loss_lm_student": first_and_last(metrics, "loss/train/loss_lm_student"),
        "samples_per_s": round(samples / train_seconds, 2),
    }
    print(f"\nimages with predictions: {FOLDER}/predictions, at each evaluation: {FOLDER}/run/images\n")
    print(f"| {'measure':40} | {'value':>18} |\n| {'-' * 40} | {'-' * 17}: |")
    for row in metrics:
        if "metrics/eval/box_ap50" in row:
            curve = " / ".join(
                f"{row[f'metrics/eval/{name}']:.2f}" for name in ("box_ap50", "caption_match", "text_f1")
            )
            print(f"| {'evaluation: AP50 / caption match / F1':40} | {curve:>18} |")
    for name, value in result.items():
        shown = " → ".join(f"{x:.3f}" for x in value) if isinstance(value, list) else f"{value}"
        print(f"| {name:40} | {shown:>18} |")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
