"""Run the whole line on a set of real images: split, train with captions, calibrate, predict, draw.

    python tests/benchmarks/photos.py SHARED_DATA/chess_train [--steps 500] [--seed 17]

The folder holds `images` and `instances.json`; a fifth of its images is held out. The head learns boxes and captions
from a tiny random checkpoint; the language model writes no answers. Everything is written below `bench/photos`. The
held-out images with their predictions, and the gallery, are below `bench/photos/NAME/SEED/predictions`. The last line
is JSON: the scores of `recipe/eval.py` that have to do with boxes and captions, `ece` on the held-out half of the
calibration among them.
"""

import argparse
import json
import shutil
from pathlib import Path

from quickstart import ROOT, YAML, run
from real_sets import REAL, make_real_set

FOLDER = Path("bench", "photos")
SCORES = ("box_ap50", "category_ap50", "caption_match", "densecap_map_meteor", "ece", "best_f1")  # of a scorer: its own


def main() -> None:
    """Run everything and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of `images` and `instances.json`")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=17)
    args = parser.parse_args()
    folder = FOLDER / args.source.name / str(args.seed)
    shutil.rmtree(ROOT / folder, ignore_errors=True)
    _, held_out = make_real_set(args.source, ROOT / folder, args.seed)
    settings = {
        "seed": args.seed,
        "run_folder": folder / "run",
        "model.pretrained_model_name_or_path": folder / "tiny",
        "train_loader.streams.shapes.local": folder,
        "eval_loader.streams.shapes.local": folder,
        "teachers": "{stream: null, num_teachers: 0}",
        "prompt.student_answer": "false",
        "evaluation.answers": "null",
        "caption_decoder": "{num_layers: 2, max_caption_tokens: null}",
        "trainer": f"{{max_duration: {args.steps}ba, eval_interval: {args.steps}ba, save_interval: {args.steps}ba}}",
        **REAL,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    checkpoint = str(folder / "run" / "checkpoints" / "latest-rank0.pt")
    run("python", "recipe/train.py", YAML, *overrides)
    run("python", "recipe/eval.py", YAML, *overrides, f"load_path={checkpoint}")
    images = ROOT / folder / "pictures"
    images.mkdir()
    for sample in held_out:
        (images / sample.id.split("/")[-1]).with_suffix(".jpg").write_bytes(sample.image)
    out = str(folder / "predictions")
    fitted = folder / "run" / "calibration.yaml"
    calibration = ["--calibration", str(fitted)] if (ROOT / fitted).exists() else []  # none if nothing was found
    run(
        *("python", "recipe/predict.py", "--checkpoint", checkpoint, "--out", out, "--answer", "boxes", *calibration),
        str(images.relative_to(ROOT)),
    )
    truth = ["--data", str(folder), "--split", "val"]
    page = [f"{out}/predictions.json", *truth, "--out", f"{out}/gallery.html"]
    run("python", "-m", "recipe.gallery", "--predictions", *page)
    scores = json.loads((ROOT / folder / "run" / "eval.json").read_text())
    print(json.dumps({name: round(value, 4) for name, value in scores.items() if name.startswith(SCORES)}))


if __name__ == "__main__":
    main()
