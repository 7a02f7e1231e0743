"""Time the scores of an evaluation: next to faster-coco-eval alone, and next to an older build of this repository.

    python tests/benchmarks/metrics_speed.py [--baseline TREE_OR_COMMIT] [--images 5000] [--repeats 5]

Images are drawn, with 100 detections and seven objects on average, half of which are found. `boxes` are all scores that
read captions at most as one of 80 categories: AP with and without categories, recall of the queries, expressions,
calibration. `coco` is faster-coco-eval alone, from dictionaries that are ready, with and without categories. `captions`
are the scores of captions, of two to ten words. Times are CPU seconds of one thread, medians. Each repeat is a process
of its own, the builds in turns. The last line is JSON.
"""

import argparse
import importlib.util
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from build_speed import ROOT, environment, older_build

DETECTIONS, SIZE = 100, (640, 480)
NAMES = [f"{color} {noun}" for color in ("red", "blue", "old", "small") for noun in (
    "cup", "dog", "cat", "chair", "table", "person", "horse", "boat", "train", "bottle", "bicycle", "car", "bench",
    "bird", "sheep", "book", "clock", "vase", "oven", "sink",
)]  # fmt: skip
PHRASES = ("", "standing next to a", "on top of the", "in front of a big", "with the other", "behind a")
Parts = dict[str, Callable[[], Any]]


def drawn(num_images: int, with_phrases: bool, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Return predictions and samples of the build whose `recipe` is imported."""
    from recipe.schema import DetectedObject, Object, Prediction, Sample

    draw = random.Random(seed)

    def box() -> tuple[float, float, float, float]:
        width, height = (size * (0.02 + 0.4 * draw.random() ** 2) for size in SIZE)
        x, y = draw.random() * (SIZE[0] - width), draw.random() * (SIZE[1] - height)
        return x, y, x + width, y + height

    def caption() -> str:
        name, phrase = draw.choice(NAMES), draw.choice(PHRASES) if with_phrases else ""
        return f"{name} {phrase} {draw.choice(NAMES)}" if phrase else name

    predictions, samples = [], []
    for number in range(num_images):
        truths = [Object(box(), caption()) for _ in range(draw.randint(0, 14))]
        found = []
        for place in range(DETECTIONS):
            if place < len(truths) and draw.random() < 0.5:
                x1, y1, x2, y2 = truths[place].box
                dx, dy = (draw.uniform(-0.1, 0.1) * side for side in (x2 - x1, y2 - y1))
                text = truths[place].caption if draw.random() < 0.5 else caption()
                found.append(DetectedObject((x1 + dx, y1 + dy, x2 + dx, y2 + dy), draw.uniform(0.3, 1), text))
            else:
                found.append(DetectedObject(box(), draw.random() ** 4, caption()))
        found.sort(key=lambda item: -item.score)
        samples.append(Sample(str(number), b"x", *SIZE, tuple(truths)))
        predictions.append(Prediction(str(number), *SIZE, tuple(found)))
    return predictions, samples


def parts_of_this_build(num_images: int) -> Parts:
    """Return what is timed, of a build whose scores are functions."""
    from recipe.metrics import boxes, captions
    from recipe.metrics.calibration import calibration
    from recipe.metrics.scorers import MeteorLite

    by_name, by_phrase = drawn(num_images, False), drawn(num_images, True)

    def score_boxes() -> dict[str, Any]:
        found = {**boxes.box_average_precision(*by_name), **boxes.category_average_precision(*by_name)}
        return {
            **found,
            **boxes.query_recall(*by_name, 100),
            **boxes.expression_accuracy(*by_name),
            **calibration(*by_name),
        }

    def score_captions() -> dict[str, Any]:
        scorer = MeteorLite()
        dense = captions.dense_captioning(*by_phrase, scorer)
        return {**dense, **captions.caption_match(*by_phrase, 0.5, scorer)}

    return {"boxes": score_boxes, "captions": score_captions, "coco": lambda: coco_alone(*by_name)}


def parts_of_2d61bb2(num_images: int) -> Parts:
    """Return the same of commit 2d61bb2, whose scores are torchmetrics."""
    from recipe.metrics.average_precision import BoxAveragePrecision, CategoryAveragePrecision  # pyright: ignore[reportMissingImports]
    from recipe.metrics.cider import CaptionCider  # pyright: ignore[reportMissingImports]
    from recipe.metrics.dense_caption import CaptionMatch  # pyright: ignore[reportMissingImports]
    from recipe.metrics.dense_captioning import DenseCaptioningMAP  # pyright: ignore[reportMissingImports]
    from recipe.metrics.meteor import MeteorLite  # pyright: ignore[reportMissingImports]
    from recipe.metrics.recall import ExpressionAccuracy, QueryRecall  # pyright: ignore[reportMissingImports]

    from recipe.metrics.calibration import Calibration  # pyright: ignore[reportAttributeAccessIssue]

    by_name, by_phrase = drawn(num_images, False), drawn(num_images, True)

    def computed(metrics: list[Any], data: tuple[list[Any], list[Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for metric in metrics:
            for start in range(0, num_images, 8):  # by batches, as a run adds them
                metric.update(*(rows[start : start + 8] for rows in data))
            value = metric.compute()
            found |= value if isinstance(value, dict) else {"caption_cider_d": value}
        return {name: float(value) for name, value in found.items()}

    def score_boxes() -> dict[str, Any]:
        metrics = [
            BoxAveragePrecision(),
            CategoryAveragePrecision(),
            QueryRecall(100),
            ExpressionAccuracy(),
            Calibration(),
        ]
        return computed(metrics, by_name)

    def score_captions() -> dict[str, Any]:
        scorer = MeteorLite()
        return computed([DenseCaptioningMAP(scorer), CaptionMatch(0.5, scorer), CaptionCider(0.5)], by_phrase)

    return {"boxes": score_boxes, "captions": score_captions}


def coco_alone(predictions: list[Any], samples: list[Any]) -> Callable[[], dict[str, Any]]:
    """Return how faster-coco-eval scores the same boxes by its own code, with and without categories."""
    from copy import deepcopy

    from faster_coco_eval import COCO, COCOeval_faster

    numbers = {name: number for number, name in enumerate(NAMES, start=1)}

    def fields(image: int, item: Any) -> dict[str, Any]:
        x1, y1, x2, y2 = item.box
        return {"image_id": image, "category_id": numbers[item.caption], "bbox": [x1, y1, x2 - x1, y2 - y1]}

    truths = [{**fields(image, item), "iscrowd": 0} for image, sample in enumerate(samples) for item in sample.objects]
    for number, row in enumerate(truths, start=1):
        row |= {"id": number, "area": row["bbox"][2] * row["bbox"][3]}
    rows = [
        {**fields(image, item), "score": item.score}
        for image, prediction in enumerate(predictions)
        for item in prediction.objects
    ]
    images = [{"id": image, "width": SIZE[0], "height": SIZE[1]} for image in range(len(samples))]
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    given = {"images": images, "annotations": truths, "categories": categories}
    copies = [(given, rows), deepcopy((given, rows))]  # it writes into them

    def score() -> dict[str, Any]:
        found = {}
        for (own, own_rows), (name, by_category) in zip(copies, (("box", 0), ("category", 1)), strict=True):
            truth = COCO(own)
            coco = COCOeval_faster(truth, truth.loadRes(own_rows), "bbox", print_function=lambda *args: None)
            coco.params.useCats = by_category
            coco.run()
            found[f"{name}_ap"], found[f"{name}_ap50"] = (float(value) for value in coco.stats[:2])
        return found

    return score


def work(num_images: int) -> None:
    """Time all parts of the build that is on the path, and print JSON."""
    import torch

    torch.set_num_threads(1)
    is_old = importlib.util.find_spec("recipe.metrics.captions") is None
    parts = (parts_of_2d61bb2 if is_old else parts_of_this_build)(num_images)
    report: dict[str, Any] = {"seconds": {}, "scores": {}}
    for name, part in parts.items():
        if name == "coco":
            part = part()  # makes its dictionaries, which count neither in its time nor in the peak
        start = time.process_time()
        report["scores"][name] = part()
        report["seconds"][name] = time.process_time() - start
        if name == "captions":
            # Not ru_maxrss, which a process inherits from the one that started it.
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            report["peak_mib"] = int(status["VmHWM"].split()[0]) / 1024
    print("WORKER " + json.dumps(report))


def measure(tree: Path, num_images: int) -> dict[str, Any]:
    """Return what one process of a build took."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--images", str(num_images)]
    done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("WORKER ")]
    if done.returncode or not lines:
        raise RuntimeError(f"the scores of {tree} failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[0].removeprefix("WORKER "))


def check_equal(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise AssertionError unless all scores that two ways share are equal to 1e-6."""
    for part in old:
        for name, value in old[part].items():
            # `meteor_lite2` has the stems of a newer Snowball.
            if name in new[part] and abs(new[part][name] - value) > 1e-6:
                raise AssertionError(f"{name} is {new[part][name]} and was {value}")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", default="2d61bb2", help="folder of an older build, or its commit")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.images)
        return
    with older_build(args.baseline) as old:
        runs: dict[str, list[dict[str, Any]]] = {"old": [], "new": []}
        for _ in range(args.repeats):
            for name, tree in (("old", old), ("new", ROOT)):
                runs[name].append(measure(tree, args.images))
                print(name, json.dumps(runs[name][-1]["seconds"]), flush=True)
    new, before = runs["new"][-1]["scores"], runs["old"][-1]["scores"]
    check_equal(before, new)
    check_equal({"boxes": new["coco"]}, new)
    report = {}
    for build, found in runs.items():
        for part in found[0]["seconds"]:
            report[f"{part}_{build}_s"] = median(run["seconds"][part] for run in found)
        report[f"peak_{build}_mib"] = max(run["peak_mib"] for run in found)
    report["boxes_over_coco"] = report["boxes_new_s"] / report["coco_new_s"]
    report["captions_over_old"] = report["captions_new_s"] / report["captions_old_s"]
    print(json.dumps({name: round(value, 3) for name, value in report.items()}))


if __name__ == "__main__":
    main()
