"""Class lists: predict and eval score every object by class."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from streaming import StreamingDataset

from convert.shapes import draw_scene
from recipe.checkpoints.weights import EVALUATED, find_config
from recipe.checks import check_machine
from recipe.config import ConfigError
from recipe.configure import load_config, save_config
from recipe.eval import main as evaluate
from recipe.predict import main as predict
from recipe.prediction.files import read_entries
from recipe.prediction.options import parse
from recipe.schema import Sample
from tests.support.tiny_run import train_tiny_run

CLASSES = ["large red star", "small blue circle", "large red circle"]


@pytest.fixture
def scenes(tmp_path: Path) -> list[Sample]:
    return [draw_scene(seed=4, index=index, image_size=84, min_objects=2) for index in range(3)]


def predicted(
    checkpoint: Path, scenes: list[Sample], out: Path, classes: str | None, *more: str
) -> list[dict[str, Any]]:
    """What is written with `--classes`, or without."""
    more = more if classes is None else ("--classes", classes, *more)
    pictures = []
    for index, scene in enumerate(scenes):
        pictures.append(out.parent / f"scene-{index}.png")
        pictures[-1].write_bytes(scene.image)
    options = ["--answer", "boxes", "--score-threshold", "0", "--no-drawings", *more]
    assert predict(parse(["--checkpoint", str(checkpoint), "--out", str(out), *options, *map(str, pictures)])) == 0
    return json.loads((out / "predictions.json").read_text())


def test_every_object_has_a_probability_of_each_class(
    trained_checkpoint: Path, scenes: list[Sample], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = predicted(trained_checkpoint, scenes, tmp_path / "out", ", ".join(CLASSES))
    assert "category_id 1 to 3 are the classes in the order given" in capsys.readouterr().out
    objects = [item for row in rows for item in row["objects"]]
    for item in objects:
        assert set(item["classes"]) <= set(CLASSES) and next(iter(item["classes"])) == item["caption"]
        assert list(item["classes"].values()) == sorted(item["classes"].values(), reverse=True)
        assert 1 - 0.01 * len(CLASSES) <= sum(item["classes"].values()) <= 1 + 1e-5
    results = json.loads((tmp_path / "out" / "coco_results.json").read_text())
    expected = [(item["score"] * share, name) for item in objects for name, share in item["classes"].items()]
    assert [row["caption"] for row in results] == [name for _, name in expected]
    assert [row["score"] for row in results] == pytest.approx([score for score, _ in expected], rel=1e-4)
    assert [row["category_id"] for row in results] == [1 + CLASSES.index(row["caption"]) for row in results]
    assert [entry.to_json() for entry in read_entries(tmp_path / "out" / "predictions.json")] == rows


def test_an_image_has_the_probabilities_that_it_has_alone(
    trained_checkpoint: Path, scenes: list[Sample], tmp_path: Path
) -> None:
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n\n")
    together = predicted(trained_checkpoint, scenes, tmp_path / "out", str(tmp_path / "classes.txt"))
    alone = predicted(trained_checkpoint, scenes, tmp_path / "alone", ",".join(CLASSES), "--batch-size", "1")
    for row, other in zip(together, alone, strict=True):
        for item, same in zip(row["objects"], other["objects"], strict=True):
            assert item["classes"] == pytest.approx(same["classes"], abs=1e-4)


def test_eval_scores_by_class(trained_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(find_config(trained_checkpoint), load_path=str(trained_checkpoint), run_folder=str(tmp_path))
    config = replace(config, evaluation=replace(config.evaluation, classes=CLASSES, answers=None))
    scores = evaluate(config)
    printed = capsys.readouterr().out
    assert re.search(r"category +truths +AP +AP50 +recall +worst image", printed)
    written = json.loads((tmp_path / "eval.json").read_text())
    assert len(written.pop(EVALUATED)) == 64
    report = written.pop("categories")
    assert written == scores
    by_category = [entry["ap"] for entry in report["scores"].values()]
    assert scores["category_ap"] == pytest.approx(sum(by_category) / len(by_category), abs=1e-6)
    assert {found for _, found, _ in report["confusion"]} <= {*CLASSES, ""}


@pytest.mark.slow
def test_the_classes_of_the_training_set_stay_with_the_run(
    tiny_checkpoint: str, scenes: list[Sample], tmp_path: Path
) -> None:
    """A run finds them in its data; its checkpoint and its export name them, so they need no data."""
    checkpoint = train_tiny_run(tiny_checkpoint, tmp_path, evaluation={"classes": ["data"], "answers": None})
    stored = [
        Sample.from_mds(row) for row in StreamingDataset(local=str(tmp_path / "data"), split="train", batch_size=1)
    ]
    captions = sorted({item.caption for sample in stored for item in sample.objects or ()})
    config = find_config(checkpoint)
    assert config.evaluation.classes == captions
    assert load_config(str(tmp_path / "run" / "config.yaml")).evaluation.classes == captions
    shutil.rmtree(tmp_path / "data")
    rows = predicted(checkpoint, scenes, tmp_path / "out", None)
    assert {name for row in rows for item in row["objects"] for name in item["classes"]} <= set(captions)
    config = replace(config, load_path=str(checkpoint), evaluation=replace(config.evaluation, classes=["data"]))
    with pytest.raises(ConfigError, match=r"2 settings(.|\n)*train_loader.streams.shapes.local: .* does not exist"):
        check_machine(config, ("eval_loader",))
    with pytest.raises(ConfigError, match="no training set is at hand: give the names, as --classes"):
        save_config(config, tmp_path / "data.yaml")
        predicted(checkpoint, scenes, tmp_path / "again", None, "--config", str(tmp_path / "data.yaml"))


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["a", "A "], "evaluation.classes: the classes 'a' and 'A' are the same: leave one out"),
        (["a"], "evaluation.classes: 1 classes leave no choice: give two or more"),
        (["a", "b" * 200], r"evaluation.classes: the class 'b+' has \d+ tokens with end-of-sequence, the head writes"),
    ],
)
def test_a_wrong_list_is_refused_before_the_weights_are_used(
    trained_checkpoint: Path, tmp_path: Path, classes: list[str], expected: str
) -> None:
    config = replace(find_config(trained_checkpoint), load_path=str(trained_checkpoint), run_folder=str(tmp_path))
    with pytest.raises(ConfigError, match=expected):
        evaluate(replace(config, evaluation=replace(config.evaluation, classes=classes)))


@pytest.mark.parametrize(("value", "expected"), [("a", "1 names; give two or more"), (" , ", "0 names; give two")])
def test_a_list_without_a_choice_ends_the_command(
    value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["--checkpoint", "c", "--out", "o", "--classes", value, "x.png"])
    assert expected in capsys.readouterr().err
