"""Make predictions, truths and a small page, shared by the tests of the gallery."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from recipe.prediction.files import PredictedFile
from recipe.schema import Object, Sample

NASTY = "</script><img src=x onerror=alert(1)>&amp; \u2028 \"'猫"


def found(x: float, score: float, caption: str = "cat") -> dict[str, Any]:
    """Return a box of 10 x 10 pixels."""
    return {"box": [x, 0.0, x + 10, 10.0], "score": score, "caption": caption}


def true(x: float, caption: str = "cat", iscrowd: bool = False) -> Object:
    return Object((x, 0.0, x + 10, 10.0), caption, iscrowd)


def row(name: str, objects: list[dict[str, Any]] | None, file: str = "gone.png", **changes: Any) -> dict[str, Any]:
    entry = {"id": name, "file": file, "image_id": 1, "width": 100, "height": 50, "objects": objects}
    return {**entry, "answer": None, "answer_objects": None, "error": None, **changes}


def entry(name: str, objects: list[dict[str, Any]] | None, file: str = "gone.png", **changes: Any) -> PredictedFile:
    return PredictedFile.from_json(row(name, objects, file, **changes))


def sample(name: str, *objects: Object) -> Sample:
    data = BytesIO()
    Image.new("RGB", (100, 50), name_colour(name)).save(data, "PNG")
    return Sample(name, data.getvalue(), 100, 50, objects)


def name_colour(name: str) -> tuple[int, int, int]:
    return (sum(name.encode()) % 256, 90, 160)


def make_gallery_files(folder: Path) -> Path:
    """Write four images to `folder`, what was predicted of them, and the truth."""
    rows, images, annotations = [], [], []
    truths = {
        "good": [true(0), true(30)],
        "worst": [true(0), true(30), true(60), true(80, iscrowd=True)],
        "none": [],
        "other": [true(0)],
    }
    for number, (name, objects) in enumerate(truths.items(), start=1):
        (folder / f"{name}.png").write_bytes(sample(name).image)
        images.append({"id": number, "file_name": f"{name}.png", "width": 100, "height": 50})
        annotations += [
            {"image_id": number, "category_id": 1, "bbox": [item.box[0], 0, 10, 10], "iscrowd": int(item.iscrowd)}
            for item in objects
        ]
    predicted = {
        "good": [found(0, 0.9), found(30, 0.6, "dog"), found(60, 0.2)],
        "worst": [found(45, 0.8), found(81, 0.7)],
        "none": [found(0, 0.4, NASTY)],
    }
    rows = [row(name, items, str(folder / f"{name}.png")) for name, items in predicted.items()]
    answer = [{"box": [0.0, 0.0, 10.0, 10.0], "caption": "cat"}]
    rows[1] |= {"answer": NASTY, "answer_objects": answer}
    rows.append(row("broken", None, "broken.png", error=NASTY, width=None, height=None))
    (folder / "predictions.json").write_text(json.dumps(rows))
    categories = [{"id": 1, "name": "cat"}]
    (folder / "instances.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return folder


def options(folder: Path, *more: str) -> list[str]:
    return ["--predictions", str(folder / "predictions.json"), "--out", str(folder / "page.html"), *more]
