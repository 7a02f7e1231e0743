"""`recipe.prediction.files`: what is written about predictions, and what is read back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipe.prediction.files import (
    NO_CATEGORY,
    PredictedFile,
    category_ids,
    coco_results,
    least_score,
    read_entries,
    rounded,
    with_objects_below,
    write_entries,
)
from recipe.schema import DetectedObject, Prediction
from tests.support.gallery_cases import found, row

BOX = (0.0, 0.1 + 0.2, 1 / 3, 1.0)
FULL = Prediction(
    "a", 4, 4, (DetectedObject(BOX, 1.0, "cat"), DetectedObject(BOX, 1 / 7, "犬")), "[...]",
    (DetectedObject(BOX, 1.0, "cat"), DetectedObject(BOX, 0.5, "")), True,
)  # fmt: skip


@pytest.mark.parametrize(
    "prediction",
    [
        FULL,
        replace(FULL, objects=(), answer_objects=(), answer_is_cut=False),
        replace(FULL, objects=(), with_head=False, answer=None, answer_objects=None),
        replace(FULL, answer="no boxes", answer_objects=None),
    ],
)
def test_predictions_go_through_json_and_back(prediction: Prediction):
    """Without loss: every bit of a score and a box, no head asked apart from nothing found."""
    assert Prediction.from_json(json.loads(json.dumps(prediction.to_json()))) == prediction
    for entry in (
        PredictedFile("a", "dir/a.png", 7, prediction, 0.25),
        PredictedFile("a", "dir/a.png", 7, prediction, 0.25, None, 0.05, (DetectedObject(BOX, 0.2, ""),)),
        PredictedFile("a", "dir/a.png", "seven", None, error="not an image"),
    ):
        assert PredictedFile.from_json(json.loads(json.dumps(entry.to_json()))) == entry


def test_files_of_earlier_versions_are_read(tmp_path: Path):
    """Without `score_threshold`, `answer_is_cut` and `image_id`; and what is written has the keys it always had."""
    item, text = found(0, 0.9), {"box": [0, 0, 5, 5], "caption": "dog"}
    known = {**row("a", [item]), "answer": "[...]", "answer_objects": [text]}
    failed = row("b", None, error="broken", width=None, height=None)
    older = [{key: value for key, value in entry.items() if key != "image_id"} for entry in (known, failed)]
    (tmp_path / "predictions.json").write_text(json.dumps(older))
    entries = read_entries(tmp_path / "predictions.json")
    object_ = DetectedObject((0.0, 0.0, 10.0, 10.0), 0.9, "cat")
    answered = DetectedObject((0.0, 0.0, 5.0, 5.0), 1.0, "dog")
    assert entries == [
        PredictedFile("a", "gone.png", None, Prediction("a", 100, 50, (object_,), "[...]", (answered,))),
        PredictedFile("b", "gone.png", None, None, error="broken"),
    ]
    write_entries(tmp_path, entries)
    again = json.loads((tmp_path / "predictions.json").read_text())
    added = {"score_threshold": None, "image_id": None}
    assert again == [{**known, **added, "answer_is_cut": False}, {**failed, **added, "answer_is_cut": None}]
    assert list(again[0]) == [
        "id", "file", "image_id", "width", "height", "score_threshold", "objects", "answer", "answer_objects",
        "answer_is_cut", "error",
    ]  # fmt: skip


def test_low_scores_keep_their_digits(tmp_path: Path):
    """So that AP of the file is that of the scores: none becomes 0, and no two become equal."""
    scores = [0.123456789, 0.12341, 1.23456e-6, 1.23455e-6, 1e-9]
    prediction = Prediction("a", 4, 4, tuple(DetectedObject((0.0, 0.0, 1.0, 1.0), score, "cat") for score in scores))
    write_entries(tmp_path, [PredictedFile("a", "a.png", 1, rounded(prediction, 0.0), 0.0)])
    expected = [0.123457, 0.12341, 1.23456e-6, 1.23455e-6, 1e-9]
    (entry,) = read_entries(tmp_path / "predictions.json")
    assert entry.prediction is not None
    assert [item.score for item in entry.prediction.objects] == expected
    results = json.loads((tmp_path / "coco_results.json").read_text())
    assert [item["score"] for item in results] == expected


def test_categories_of_results():
    """Named like the caption, but for blanks and case; none where nobody can tell; a single one is that of all."""
    captions = ("cat", " STRASSE", "a red cat", "", "dog")
    found = tuple(DetectedObject(BOX, 0.5, caption) for caption in captions)
    entries = [PredictedFile("a", "a.png", 7, replace(FULL, objects=found), 0.3)]

    def ids(*categories: tuple[str, int | str]) -> list[int | str]:
        return [row["category_id"] for row in coco_results(entries, category_ids(categories))]

    assert ids(("Cat ", 17), ("straße", "s"), ("bird", 1)) == [17, "s", NO_CATEGORY, NO_CATEGORY, NO_CATEGORY]
    assert ids(("cat", 1), ("CAT", 2), ("dog", 3)) == [NO_CATEGORY] * 4 + [3]
    assert ids(("object", 5)) == [5] * 5
    assert [row["category_id"] for row in coco_results(entries)] == [1] * 5


def test_the_least_score_of_a_file():
    known = PredictedFile("a", "a.png", 1, FULL, 0.372846)
    older, failed = replace(known, score_threshold=None), PredictedFile("b", "b.png", 2, None, error="not an image")
    assert least_score([failed, known, replace(known, score_threshold=0.2), older]) == 0.372846
    assert least_score([failed, older]) == least_score([]) == 0
    low = replace(known, least_score=0.05, objects_below=())
    assert (least_score([low, low], below=True), least_score([low, known], below=True)) == (0.05, 0.372846)


def test_what_is_written_of_a_prediction():
    """Objects from the threshold up, in hundredths of a pixel; without the head none, apart from the answer's."""
    written = rounded(FULL, 1 / 7)
    assert [(item.box, item.score) for item in written.objects] == [
        ((0.0, 0.3, 0.33, 1.0), 1.0),
        ((0.0, 0.3, 0.33, 1.0), 0.142857),
    ]
    assert len(rounded(FULL, 0.15).objects) == 1
    known = PredictedFile("a", "a.png", 1, written, 0.5)
    low = replace(FULL, objects=tuple(DetectedObject(BOX, score, "") for score in (0.9, 0.4999, 0.05, 0.0499)))
    below = with_objects_below(known, low, 0.5)
    assert [item.score for item in below.objects_below or ()] == [0.4999, 0.05] and below.least_score == 0.05
    assert coco_results([below]) == coco_results([known]), "they are no results"
    least = with_objects_below(known, low, 0.01)
    assert (least.objects_below, least.least_score) == ((), 0.01)
    silent = rounded(FULL, 0.0, with_head=False)
    assert (silent.objects, silent.with_head, silent.answer_objects) == ((), False, written.answer_objects)


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
        ({"least_score": "0"}, "least_score is '0', not a number"),
        ({"objects_below": [{"box": [0, 0, 5, 5], "caption": ""}]}, r"objects_below\[0\].score is None, not a number"),
        ({"width": None}, "width is None, not a number"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps([row("good", [found(0, 0.9)]), {**row("bad", []), **changes}]))
    with pytest.raises(ValueError, match=rf"predictions.json: image 'bad': {problem}.*: predict again"):
        read_entries(path)


def test_rows_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps([row("a", []), row("a", [])]))
    with pytest.raises(ValueError, match="several images have the id 'a'"):
        read_entries(path)
    path.write_text("[" + json.dumps(row("a", [], score_threshold=0.5)).replace("0.5", "1e999") + "]")
    with pytest.raises(ValueError, match="score_threshold is inf"):
        read_entries(path)
