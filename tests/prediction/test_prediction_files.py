"""`recipe.prediction.files`: what is written about predictions, and what is read back."""

import json
from pathlib import Path
from typing import Any

import pytest

from recipe.prediction.files import failed_row, least_score, prediction_row, read_rows, write_rows
from recipe.schema import DetectedObject, Prediction
from tests.support.gallery_cases import found, row


def test_low_scores_keep_their_digits(tmp_path: Path):
    """So that AP of the file is that of the scores: none becomes 0, and no two become equal."""
    scores = [0.123456789, 0.12341, 1.23456e-6, 1.23455e-6, 1e-9]
    box = (0.0, 0.0, 1.0, 1.0)
    prediction = Prediction("a", 4, 4, tuple(DetectedObject(box, score, "cat") for score in scores))
    write_rows(tmp_path, [prediction_row(Path("a.png"), 1, prediction, 0.0)])
    expected = [0.123457, 0.12341, 1.23456e-6, 1.23455e-6, 1e-9]
    (row,) = read_rows(tmp_path / "predictions.json")
    assert [item["score"] for item in row["objects"]] == expected
    results = json.loads((tmp_path / "coco_results.json").read_text())
    assert [item["score"] for item in results] == expected


def test_the_least_score_of_a_file():
    """Of what is written: a score as good as the threshold is never below it."""
    threshold = 0.37284567
    prediction = Prediction("a", 4, 4, (DetectedObject((0.0, 0.0, 1.0, 1.0), threshold, "cat"),))
    row = prediction_row(Path("a.png"), 1, prediction, threshold)
    assert row["score_threshold"] == row["objects"][0]["score"] == 0.372846
    failed = failed_row("b", Path("b.png"), 2, ValueError("no picture"))
    older = {key: value for key, value in row.items() if key != "score_threshold"}
    assert least_score([failed, row, {**row, "score_threshold": 0.2}, older]) == 0.372846
    assert least_score([failed, older]) == least_score([]) == 0


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"objects": [{"score": 0.5, "caption": "cat"}]}, r"objects\[0\].box is None, not four numbers"),
        ({"objects": [found(0, 0.9), {"box": [0, 0, 9], "score": 0.5, "caption": "cat"}]}, r"objects\[1\].box is \["),
        ({"objects": [{"box": [0, 0, 5, 5], "score": 0.5}]}, r"objects\[0\].caption is None, not a text"),
        ({"objects": [{**found(0, 0.9), "score": "high"}]}, r"objects\[0\].score is 'high', not a number"),
        ({"objects": [{**found(0, 0.9), "score": True}]}, r"objects\[0\].score is True, not a number"),
        ({"answer_objects": [{"caption": "cat"}]}, r"answer_objects\[0\].box is None"),
        ({"objects": ["cat"]}, r"objects\[0\] is 'cat', not an object"),
        ({"objects": "cat"}, "objects is 'cat', not a list"),
        ({"score_threshold": "0.3"}, "score_threshold is '0.3', not a number"),
        ({"width": None}, "width is None, not a number"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps([row("good", [found(0, 0.9)]), {**row("bad", []), **changes}]))
    with pytest.raises(ValueError, match=rf"predictions.json: picture 'bad': {problem}.*: predict anew"):
        read_rows(path)


def test_rows_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps([row("a", []), row("a", [])]))
    with pytest.raises(ValueError, match="several pictures are called 'a'"):
        read_rows(path)
    path.write_text("[" + json.dumps(row("a", [], score_threshold=0.5)).replace("0.5", "1e999") + "]")
    with pytest.raises(ValueError, match="score_threshold is inf"):
        read_rows(path)
