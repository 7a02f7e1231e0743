"""Over-fit the first photos of a COCO data set from the tiny checkpoint, through the recipe's own commands.

    python tests/benchmarks/overfit.py --annotations instances.json --images DIR [--num-photos 16] [key=value ...]

The last line is JSON: `box_ap50 caption_match train_seconds` and `curve` (epoch, AP50, caption match).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "overfit"


def run(*command: str) -> None:
    """Run one of the recipe's commands as a user would, in the repository."""
    executable = Path(sys.executable).parent / command[0]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([str(executable), *command[1:]], cwd=ROOT, check=True, env=environment)


def first_photos(annotations: Path, num_photos: int) -> Path:
    """Write a COCO file of the first `num_photos` images of another."""
    coco = json.loads(annotations.read_text())
    coco["images"] = coco["images"][:num_photos]
    kept = {image["id"] for image in coco["images"]}
    coco["annotations"] = [row for row in coco["annotations"] if row["image_id"] in kept]
    path = FOLDER / "instances.json"
    path.write_text(json.dumps(coco))
    return path


def main() -> None:
    """Convert, train and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--num-photos", type=int, default=16)
    args, overrides = parser.parse_known_args()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    photos = str(first_photos(args.annotations, args.num_photos))
    images = str(Path(args.images).resolve())
    run("python", "-m", "convert.coco", "--annotations", photos, "--images", images, "--out", "overfit/data",
        "--split", "train")  # fmt: skip
    run("python", "-m", "recipe.tiny", "--out", "overfit/tiny")
    start = time.monotonic()
    run("composer", "-n", "2", "recipe/train.py", "yamls/overfit.yaml", *overrides)
    train_seconds = time.monotonic() - start
    lines = (FOLDER / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    curve = [
        [
            row["step"],
            round(row["metrics"]["metrics/eval/box_ap50"], 4),
            round(row["metrics"]["metrics/eval/caption_match"], 4),
        ]
        for row in rows
        if "metrics/eval/box_ap50" in row["metrics"]
    ]
    print("| step | AP50 | caption match |\n| ---: | ---: | ---: |")
    for step, ap50, match in curve:
        print(f"| {step} | {ap50} | {match} |")
    print(json.dumps({"box_ap50": curve[-1][1], "caption_match": curve[-1][2], "train_seconds": round(train_seconds, 1),
                      "curve": curve}))  # fmt: skip


if __name__ == "__main__":
    main()
