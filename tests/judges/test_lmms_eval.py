"""The released lmms-eval judges `recipe_detector` on fifty images; see recipe/README.md for its environment.

ODinW's scoring drops the scores of boxes, ranks those of an image from the end of the list, and image by image. So its
mAP is ours if every score is 1 and an image's boxes are by falling score.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.shapes import draw_scene
from recipe.export import main as export
from recipe.export import parse as parse_export
from recipe.images import open_image
from recipe.metrics.boxes import category_average_precision
from recipe.predict import main as predict
from recipe.prediction.files import read_entries, rounded
from recipe.prediction.options import parse
from recipe.schema import DetectedObject, Example, Prediction, Sample

pytestmark = [
    pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval needs an environment of its own"),
    pytest.mark.slow,
]
TASK = """task: fifty_shapes
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {folder}/images.parquet}}}}
output_type: generate_until
test_split: test
process_docs: !function utils.odinw13_process_docs
doc_to_visual: !function utils.odinw13_doc_to_visual
doc_to_text: !function utils.odinw13_doc_to_text
doc_to_target: ""
process_results: !function utils.odinw13_process_results
generation_kwargs: {{max_new_tokens: 8192, temperature: 0.0, do_sample: false}}
metric_list:
- {{metric: odinw13_mAP, aggregation: !function utils.odinw13_map, higher_is_better: true}}
- {{metric: odinw13_mAP50, aggregation: !function utils.odinw13_map50, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def scenes() -> list[Sample]:
    """Of a few classes, the shapes, so that an image holds several of one."""
    drawn = [draw_scene(seed=9, index=index, image_size=84 + 28 * (index % 3), min_objects=2) for index in range(50)]
    return [
        replace(scene, objects=tuple(replace(item, caption=item.caption.split()[-1]) for item in scene.objects or ()))
        for scene in drawn
    ]


@pytest.fixture(scope="module")
def classes(scenes: Sequence[Sample]) -> list[str]:
    return sorted({item.caption for scene in scenes for item in scene.objects or ()})


@pytest.fixture(scope="module")
def task(scenes: Sequence[Sample], classes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a task in the form of ODinW, scored by lmms-eval's own functions."""
    import datasets  # pyright: ignore[reportMissingImports]

    folder = tmp_path_factory.mktemp("task")
    rows = [
        {
            "image": open_image(scene.image),
            "dataset_name": "shapes",
            "categories": classes,
            "bboxes": [list(item.box) for item in scene.objects or ()],
            "labels": [item.caption for item in scene.objects or ()],
        }
        for scene in scenes
    ]
    table = datasets.Dataset.from_list(rows)
    table.cast_column("image", datasets.Image()).to_parquet(str(folder / "images.parquet"))
    (folder / "utils.py").write_text("from lmms_eval.tasks.odinw13.utils import *\n")
    (folder / "fifty_shapes.yaml").write_text(TASK.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def exported(trained_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("judged") / "model")
    export(parse_export(["--checkpoint", str(trained_checkpoint), "--out", folder]))
    return folder


def found_in(scene: Sample, classes: Sequence[str], rng: np.random.Generator) -> Prediction:
    """A middling detector: misplaced, missed, confused and invented boxes, with scores that say something."""
    objects: list[DetectedObject] = []
    for item in scene.objects or ():
        for _ in range(rng.integers(0, 5)):
            noise = rng.normal(0, rng.choice([0.5, 3, 12]), 4)
            x1, y1, x2, y2 = np.clip(np.array(item.box) + noise, 0, scene.width).tolist()
            caption = item.caption if rng.random() < 0.7 else str(rng.choice(classes))
            score = float(rng.beta(5, 2) if abs(noise).max() < 4 and caption == item.caption else rng.beta(2, 4))
            objects.append(DetectedObject((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), score, caption))
    objects.sort(key=lambda item: -item.score)
    return rounded(Prediction(scene.id, scene.width, scene.height, tuple(objects)), 0.0)


def as_judged(predictions: Sequence[Prediction], places: slice = slice(None)) -> list[Prediction]:
    """The predictions with their best class and the score 1, in the order in which they are to rank."""
    ones = []
    for prediction in predictions:
        best = sorted((item.per_class()[0] for item in prediction.objects), key=lambda item: -item.score)
        ones.append(replace(prediction, objects=tuple(replace(item, score=1.0) for item in best[places])))
    return ones


def test_the_map_of_the_judge_is_ours_under_its_conventions(
    task: Path, scenes: list[Sample], classes: list[str], exported: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmms_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    from recipe.judges.lmms_eval import RecipeDetector

    rng = np.random.default_rng(0)
    predictions = [found_in(scene, classes, rng) for scene in scenes]

    def predicted(examples: Sequence[Example], _: Any) -> list[Prediction]:
        return [predictions[int(example.sample.id.split()[-1])] for example in examples]

    monkeypatch.setattr("recipe.judges.lmms_eval.predict_examples", predicted)
    model = RecipeDetector(exported, batch_size=8, score_threshold=0)
    manager = TaskManager(include_path=str(task), include_defaults=False)
    results = simple_evaluate(model, tasks=["fifty_shapes"], task_manager=manager)
    judged = results["results"]["fifty_shapes"]
    ours = category_average_precision(as_judged(predictions), scenes)
    print(judged, ours)
    assert judged["odinw13_mAP,none"] == pytest.approx(ours["category_ap"], abs=1e-6)
    assert judged["odinw13_mAP50,none"] == pytest.approx(ours["category_ap50"], abs=1e-6)
    # Other conventions have other values: a release that keeps scores, or reads the list from its start, is noticed.
    kept = category_average_precision(predictions, scenes)["category_ap"]
    forwards = category_average_precision(as_judged(predictions, slice(None, None, -1)), scenes)["category_ap"]
    print("scores kept", kept, "list read from its start", forwards)
    assert 0.1 < forwards < ours["category_ap"] - 0.005 and ours["category_ap"] < kept - 0.1


def test_the_command_judges_an_export(
    task: Path, scenes: list[Sample], classes: list[str], exported: str, tmp_path: Path
) -> None:
    """Found by its entry point; it judges the boxes that `predict.py` writes."""
    arguments = ["--model", "recipe_detector", "--model_args", f"pretrained={exported}", "--batch_size", "8"]
    arguments += ["--tasks", "fifty_shapes", "--include_path", str(task), "--output_path", str(tmp_path / "judged")]
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")  # set by a training in this process
    alone = {name: value for name, value in os.environ.items() if name not in ranks}
    run = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *arguments], capture_output=True, text=True, timeout=600, cwd=tmp_path,
        env=alone | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    files = list((tmp_path / "judged").rglob("*results.json"))
    assert run.returncode == 0 and len(files) == 1, run.stderr[-2000:]
    judged = json.loads(files[0].read_text())["results"]["fifty_shapes"]
    images = [tmp_path / f"{place:02}.png" for place in range(len(scenes))]
    for path, scene in zip(images, scenes, strict=True):
        path.write_bytes(scene.image)
    more = ["--answer", "boxes", "--classes", ",".join(classes), "--no-drawings"]
    predict(parse(["--checkpoint", exported, "--out", str(tmp_path / "out"), *more, *map(str, images)]))
    found = [entry.prediction for entry in read_entries(tmp_path / "out/predictions.json")]
    predictions = [replace(item, id=scene.id) for item, scene in zip(found, scenes, strict=True) if item is not None]
    ours = category_average_precision(as_judged(predictions), scenes)
    print(judged, ours)
    assert judged["odinw13_mAP,none"] == pytest.approx(ours["category_ap"], abs=1e-6)
    assert judged["odinw13_mAP50,none"] == pytest.approx(ours["category_ap50"], abs=1e-6)
