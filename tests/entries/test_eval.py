"""`recipe/eval.py`: the calibration that it writes is one that it, training and prediction can use."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from convert.shapes import draw_scene
from recipe.checkpoints.check import contents_sum, manifest_at
from recipe.checkpoints.weights import EVALUATED, find_config
from recipe.config import RecipeConfig
from recipe.configure import load_config
from recipe.eval import main as evaluate
from recipe.metrics.calibration import KEYS
from recipe.predict import main as predict
from recipe.prediction.options import parse as parse_predict
from recipe.rules import check_config


@pytest.fixture
def config(trained_checkpoint: Path, tmp_path: Path) -> RecipeConfig:
    return replace(
        find_config(trained_checkpoint), load_path=str(trained_checkpoint), run_folder=str(tmp_path / "eval")
    )


def test_what_is_found_is_used(
    config: RecipeConfig,
    trained_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    # After two steps no box is right: of each image's the best two are taken to be.
    monkeypatch.setattr("recipe.metrics.gather.match_by_score", lambda iou, threshold: [(0, 0), (1, 0)])
    monkeypatch.setattr("recipe.metrics.calibration.LEAST_RIGHT", 1)
    plain = evaluate(config)
    path = tmp_path / "eval" / "calibration.yaml"
    content = yaml.safe_load(path.read_text())
    manifest = manifest_at(str(trained_checkpoint))
    assert manifest is not None
    written = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert written[EVALUATED] == contents_sum(manifest)
    values, report = content["evaluation"], content["report"]
    assert tuple(values) == KEYS
    assert report["fitted"]["before"]["images"] + report["held_out"]["before"]["images"] == 4
    printed = capsys.readouterr().out
    assert f"{path}:\ncalibrated score = sigmoid({values['score_scale']:.4g} * logit" in printed

    overrides = [f"evaluation.{key}={value}" for key, value in values.items()]
    saved = trained_checkpoint.parents[1] / "config.yaml"
    overrides += [f"load_path={trained_checkpoint}", f"run_folder={tmp_path / 'second'}"]
    changed = load_config(str(saved), overrides)
    check_config(changed)
    calibrated = evaluate(changed)
    names = [
        name for name in plain if name.startswith(("box_", "category_", "densecap_", "query_", "recall_", "loss_"))
    ]
    assert len(names) > 5
    assert {name: calibrated[name] for name in names} == {name: plain[name] for name in names}
    assert calibrated["ece"] != plain["ece"]
    # Fitted once more to scores that fit, it stays nearly as it is.
    again = yaml.safe_load((tmp_path / "second" / "calibration.yaml").read_text())["evaluation"]
    assert again == pytest.approx(values, rel=1e-3)


def test_predictions_are_calibrated(trained_checkpoint: Path, tmp_path: Path):
    picture = tmp_path / "scene.png"
    picture.write_bytes(draw_scene(seed=4, index=1, image_size=84).image)
    calibration = tmp_path / "calibration.yaml"
    rows = []
    for number, (scale, shift) in enumerate([(1.0, 0.0), (3.0, -0.5)]):
        calibration.write_text(
            f"evaluation: {{score_scale: {scale}, score_shift: {shift}, score_threshold: 0.0}}\nreport: {{}}\n"
        )
        out = tmp_path / str(number)
        arguments = ["--checkpoint", str(trained_checkpoint), "--out", str(out), "--answer", "boxes", str(picture)]
        assert predict(parse_predict([*arguments, "--calibration", str(calibration)])) == 0
        rows.append(json.loads((out / "predictions.json").read_text())[0]["objects"])
    before, after = ([item.pop("score") for item in row] for row in rows)
    assert rows[0] == rows[1]
    expected = (torch.tensor(before).logit() * 3 - 0.5).sigmoid()
    assert after == pytest.approx(expected.tolist(), abs=2e-3)  # told in four digits


def test_no_calibration_is_told_and_an_old_one_removed(
    config: RecipeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("recipe.metrics.gather.match_by_score", lambda iou, threshold: [])
    config = replace(config, evaluation=replace(config.evaluation, answers=None))
    folder = Path(config.run_folder)
    folder.mkdir()
    (folder / "calibration.yaml").write_text("of other weights")
    evaluate(config)
    assert re.search(
        r"no calibration\.yaml is written: 0 of \d+ detections .* are right, and 10 are needed", caplog.text
    )
    assert not (folder / "calibration.yaml").exists()
    assert (folder / "eval.json").exists()
