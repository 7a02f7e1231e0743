"""`recipe.judges.tasks`: which prompts ask for boxes, and how boxes are written."""

import importlib
import json
import tomllib
from pathlib import Path

import pytest

from recipe.judges.tasks import BoxQuestion, box_question, boxes_text, cut_at
from recipe.schema import DetectedObject

ODINW = (
    "Locate every instance that belongs to the following categories: ´fish, jelly fish´. Report bbox coordinates in "
    "JSON format."
)
GROUNDING = (
    'Locate every object that matches the description "dog on left", "black, small dog" in the image. Report bbox '
    "coordinates in JSON format."
)
REC = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. Please provide the bounding box coordinate of the "
    "region this sentence describes: the dog. "
)


def test_the_prompts_of_the_known_tasks() -> None:
    assert box_question(ODINW) == BoxQuestion(("fish", "jelly fish"), True, "fractions")
    assert box_question(GROUNDING) == BoxQuestion(("dog on left", "black, small dog"), False, "pixels")
    assert box_question(REC) == BoxQuestion(("the dog.",), False, "fractions")
    assert box_question("Is there a dog in the image? Answer yes or no.") is None


def test_boxes_by_rising_score_in_the_unit_of_the_task() -> None:
    objects = [
        DetectedObject((10.0, 20.0, 110.0, 60.0), 0.9, 'a "red" cat'),
        DetectedObject((0.01, 0.0, 200.0, 100.0), 0.25, "ein Kätzchen"),
        DetectedObject((1.0, 2.0, 3.0, 4.125), 0.25, "second of equals"),
    ]
    pixels = boxes_text(objects, (200, 100), "pixels")
    assert pixels == (
        '[{"bbox_2d": [0.01, 0.00, 200.00, 100.00], "label": "ein Kätzchen", "score": 0.25}, '
        '{"bbox_2d": [1.00, 2.00, 3.00, 4.12], "label": "second of equals", "score": 0.25}, '
        '{"bbox_2d": [10.00, 20.00, 110.00, 60.00], "label": "a \\"red\\" cat", "score": 0.9}]'
    )
    fractions = boxes_text(objects, (200, 100), "fractions")
    assert "e-05" not in fractions and fractions.startswith('[{"bbox_2d": [0.00005000, 0.00000000, 1.00000000, 1.00')
    assert [row["score"] for row in json.loads(fractions)] == [0.25, 0.25, 0.9]
    assert json.loads(fractions)[2]["bbox_2d"] == [0.05, 0.2, 0.55, 0.6]
    assert boxes_text([], (200, 100), "fractions") == "[]"


@pytest.mark.parametrize(
    ("ends", "left"),
    [([], "a b ASSISTANT: c"), (["ASSISTANT:"], "a b "), (["c", "b"], "a "), (["", "x"], "a b ASSISTANT: c")],
)
def test_an_answer_is_cut_at_the_first_end(ends: list[str], left: str) -> None:
    assert cut_at("a b ASSISTANT: c", ends) == left


def test_the_entry_point_names_what_exists() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    ((name, target),) = project["entry-points"]["lmms_eval.models"].items()
    module, function = target.split(":")
    assert name == "recipe_detector" and callable(getattr(importlib.import_module(module), function))
