"""Compare category AP by class scores and by caption equality.

    python tests/benchmarks/class_ap.py SHARED_DATA/bccd_trainval

The folder holds `images` and `instances.json`; a fifth of its images is held out. A tiny random model learns boxes and
captions jointly, as in frozen_trunk.py, and `recipe/eval.py` scores it twice: by its captions, and with
`evaluation.classes=data`. Everything is written below `bench/class_ap`; a run that is there is not trained again. The
last line is JSON: category AP, AP50 and the AP of each class, by captions and by classes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from frozen_trunk import joint_settings, train
from quickstart import ROOT, YAML, run
from real_sets import make_real_set

FOLDER = Path("bench", "class_ap")


def main() -> None:
    """Run everything and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of `images` and `instances.json`")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=17)
    args = parser.parse_args()
    folder = FOLDER / args.source.name / str(args.seed)
    make_real_set(args.source, ROOT / folder, args.seed)
    if not (ROOT / folder / "joint" / "checkpoints").exists():
        at_the_end = {"trainer.eval_interval": f"{args.steps}ba"}
        train(YAML, folder, "joint", args.steps, joint_settings(folder, args.seed) | at_the_end)
    found: dict[str, Any] = {}
    for way, classes in {"captions": "[]", "classes": "data"}.items():
        settings = {
            "load_path": folder / "joint" / "checkpoints" / "latest-rank0.pt",
            "run_folder": folder / way,
            "evaluation.classes": classes,
        }
        values = [f"{key}={value}" for key, value in settings.items()]
        run("composer", "-n", "1", "recipe/eval.py", str(folder / "joint" / "config.yaml"), *values)
        scores = json.loads((ROOT / folder / way / "eval.json").read_text())
        of_each = {name: round(row["ap"], 4) for name, row in scores["categories"]["scores"].items()}
        found[way] = {key: round(scores[key], 4) for key in ("category_ap", "category_ap50")} | {"of_each": of_each}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
