"""The snippets of recipe/README.md load both files of `predict.py` in supervision and FiftyOne.

They run in the Python of `SUPERVISION_PYTHON` and `FIFTYONE_PYTHON`, a command such as `judge/bin/python`, or
`judge/bin/python tests/judges/fiftyone_on_mongomock.py` without MongoDB; supervision by default in this one.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recipe.prediction.files import PredictedFile, category_ids, write_entries
from recipe.schema import DetectedObject, Prediction

ROOT = Path(__file__).parents[2]
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "recipe/README.md").read_text(), re.DOTALL | re.MULTILINE)
MOST_STATEMENTS = 5


@pytest.fixture
def found(tmp_path: Path) -> Path:
    """The files of three images: with objects, without any, and unusable; the truth names their ids."""
    (tmp_path / "images").mkdir()
    (tmp_path / "found").mkdir()
    for name in "abc":
        Image.new("RGB", (100, 50)).save(tmp_path / f"images/{name}.png")
    objects = (
        DetectedObject((10.0, 5.0, 60.0, 30.0), 0.9, "cat"),
        DetectedObject((0.0, 0.0, 100.0, 50.0), 0.4, "a dog"),
    )
    entries = [
        PredictedFile("a", "images/a.png", 7, Prediction("a", 100, 50, objects), 0.3),
        PredictedFile("b", "images/b.png", 3, Prediction("b", 100, 50, ()), 0.3),
        PredictedFile("c", "images/c.png", 9, None, error="it is broken"),
    ]
    write_entries(tmp_path / "found", entries, category_ids([("cat", 4), ("a dog", 2)]))
    boxes = [(7, 4, [10, 5, 50, 25]), (3, 2, [1, 2, 30, 40])]
    truth = {
        "images": [
            {"id": id, "file_name": f"{n}.png", "width": 100, "height": 50}
            for n, id in zip("abc", (7, 3, 9), strict=True)
        ],
        "categories": [{"id": 4, "name": "cat"}, {"id": 2, "name": "a dog"}],
        "annotations": [
            {"id": id, "image_id": image, "category_id": kind, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for id, (image, kind, box) in enumerate(boxes, start=1)
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(truth))
    return tmp_path


def python_of(library: str) -> list[str]:
    """The command that runs a script with the library; skips the test without one."""
    command = os.environ.get(f"{library.upper()}_PYTHON", sys.executable if find_spec(library) else "")
    if not command:
        pytest.skip(f"{library} is not installed: set {library.upper()}_PYTHON to a Python with it")
    return [str(ROOT / part) if part.startswith("tests/") else part for part in shlex.split(command)]


def printed(library: str, file: str, more: str, folder: Path) -> Any:
    """What the snippet about a library and a file makes, by `more`, which prints JSON."""
    (snippet,) = (text for text in SNIPPETS if f" {library} as " in text and file in text)
    (folder / "snippet.py").write_text(f"{snippet}\n{more}\n")
    home = {"HOME": str(folder / "home"), "FIFTYONE_DO_NOT_TRACK": "true", "PYTHONPATH": ""}
    command = [*python_of(library), "snippet.py"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=os.environ | home)
    assert run.returncode == 0, run.stderr[-2000:]
    (folder / "printed.txt").write_text(run.stdout)
    return json.loads(run.stdout.splitlines()[-1])


def test_the_snippets_are_short_and_complete() -> None:
    used = [(library, file) for library in ("supervision", "fiftyone") for file in ("predictions", "coco_results")]
    for library, file in used:
        (snippet,) = (text for text in SNIPPETS if f" {library} as " in text and f"found/{file}.json" in text)
        assert sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(snippet))) <= MOST_STATEMENTS
    assert sum("found/" in text for text in SNIPPETS) == len(used)


def test_supervision_reads_predictions(found: Path) -> None:
    shown = (
        "{name: [it.xyxy.tolist(), it.confidence.tolist(), it['class_name'].tolist()] for name, it in found.items()}"
    )
    assert printed("supervision", "predictions.json", f"print(json.dumps({shown}))", found) == {
        "images/a.png": [[[10, 5, 60, 30], [0, 0, 100, 50]], [0.9, 0.4], ["cat", "a dog"]],
        "images/b.png": [[], [], []],
        "images/c.png": [[], [], []],
    }


def test_supervision_reads_coco_results(found: Path) -> None:
    shown = "{name: [it.xyxy.tolist(), it.confidence.tolist(), it.class_id.tolist()] for name, it in found.items()}"
    assert printed("supervision", "coco_results.json", f"print(json.dumps({shown}))", found) == {
        "7": [[[10, 5, 60, 30], [0, 0, 100, 50]], [0.9, 0.4], [4, 2]]
    }


IN_FIFTYONE = """
import json, pathlib
print(json.dumps({
    pathlib.Path(sample.filepath).name: [[it.label, it.confidence, it.bounding_box] for it in sample.found.detections]
    for sample in data if sample.found is not None
}))
"""
BOXES_OF_A = [["cat", 0.9, [0.1, 0.1, 0.5, 0.5]], ["a dog", 0.4, [0, 0, 1, 1]]]


def test_fiftyone_reads_predictions(found: Path) -> None:
    assert printed("fiftyone", "predictions.json", IN_FIFTYONE, found) == {
        "a.png": BOXES_OF_A,
        "b.png": [],
        "c.png": [],
    }


def test_fiftyone_reads_and_scores_coco_results(found: Path) -> None:
    """The cat is found, the dog is not: the mean of both classes is a half."""
    assert printed("fiftyone", "coco_results.json", IN_FIFTYONE, found) == {"a.png": BOXES_OF_A}
    assert "\n0.5" in (found / "printed.txt").read_text()
