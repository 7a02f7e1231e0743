"""An evaluation that skips broken images scores the rest, on one rank or two, and reports and bounds what it skips."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from convert.shapes import iter_samples
from convert.write import write_split
from recipe.checkpoints.weights import EVALUATED, find_config
from recipe.config import RecipeConfig
from recipe.configure import save_config
from recipe.eval import main as evaluate
from tests.launches.launch import run_composer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Seven scenes, two of them broken, and the five others."""
    folder = str(tmp_path_factory.mktemp("data"))
    scenes = list(iter_samples(num_samples=7, seed=3, image_size=84))
    # Complete for the conversion, which reads only the header.
    broken = [replace(scene, image=scene.image[:200]) if at in (0, 4) else scene for at, scene in enumerate(scenes)]
    write_split(iter(broken), folder, "broken")
    write_split(iter(scene for at, scene in enumerate(scenes) if at not in (0, 4)), folder, "rest")
    return folder


def config_of(checkpoint: Path, data: str, split: str, folder: Path, **changes: Any) -> RecipeConfig:
    config = find_config(checkpoint)
    changes = {"streams": {"a": {"local": data, "split": split}}, "global_batch_size": 2, **changes}
    return replace(
        config,
        load_path=str(checkpoint),
        run_folder=str(folder),
        eval_loader=replace(config.eval_loader, **changes),
        evaluation=replace(config.evaluation, num_logged_images=2),
        loggers={"json_lines": {}},
    )


def logged(folder: Path) -> list[float]:
    rows = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["data/eval_skipped_samples"] for row in rows if "data/eval_skipped_samples" in row]


def test_the_rest_is_scored(
    trained_checkpoint: Path, data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = evaluate(config_of(trained_checkpoint, data, "rest", tmp_path / "rest"))
    assert "scores leave out" not in caplog.text and logged(tmp_path / "rest") == []
    with caplog.at_level(logging.WARNING):
        found = evaluate(config_of(trained_checkpoint, data, "broken", tmp_path / "1", on_bad_sample="skip"))
    assert found == pytest.approx(expected, abs=1e-5)
    assert "the scores leave out 2 samples" in caplog.text and "evaluation skipped a sample: sample" in caplog.text
    assert logged(tmp_path / "1") == [2]
    assert len(list((tmp_path / "1/images").rglob("0*_*.png"))) == 2  # none of a sample that only fills its place


def test_too_many_end_the_evaluation(trained_checkpoint: Path, data: str, tmp_path: Path) -> None:
    skips = {"on_bad_sample": "skip", "max_bad_samples": 1}
    with pytest.raises(RuntimeError, match="2 evaluation samples could not be used, above eval_loader"):
        evaluate(config_of(trained_checkpoint, data, "broken", tmp_path, **skips))


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_two_ranks_score_the_rest(trained_checkpoint: Path, data: str, tmp_path: Path) -> None:
    expected = evaluate(config_of(trained_checkpoint, data, "rest", tmp_path / "rest"))
    save_config(
        config_of(trained_checkpoint, data, "broken", tmp_path / "2", on_bad_sample="skip"), tmp_path / "run.yaml"
    )
    launch = run_composer(2, "recipe/eval.py", str(tmp_path / "run.yaml"))
    assert "the scores leave out 2 samples" in launch.output
    written = json.loads((tmp_path / "2/eval.json").read_text())
    assert written.pop("categories") and written.pop(EVALUATED)
    assert written == pytest.approx(expected, abs=1e-5)
    assert logged(tmp_path / "2") == [2]
