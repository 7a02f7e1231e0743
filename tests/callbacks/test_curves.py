"""`curves.png`: drawn from what was logged, whatever it was, and never the end of a run."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image

from recipe.build import build_all_callbacks
from recipe.callbacks import curves
from recipe.callbacks.curves import CURVES_FILE, DrawCurves, draw_curves, read_curves
from recipe.config import RecipeConfig

NOTHING = cast(Any, None)  # of state and logger, which are not read


def write_metrics(path: Path, rows: list[tuple[int | None, dict[str, Any]]]) -> Path:
    path.write_text("".join(json.dumps({"step": step, "metrics": metrics}) + "\n" for step, metrics in rows))
    return path


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    """A run of 300 steps, two evaluations, a value that is not finite and a line that was cut off."""
    rows: list[tuple[int | None, dict[str, Any]]] = [(None, {"before": 1.0})]
    for step in range(300):
        rows.append((step, {"loss/train/loss_bbox": 5.0 / (step + 1), "loss/train/loss_bbox_aux": 1.0, "text": "a"}))
        rows.append((step, {"gradient_norm/llm": "nan" if step == 7 else 2.0, "lr/llm": 0.0, "list": [1, 2]}))
    rows += [(150, {"metrics/eval/box_ap50": 0.1}), (300, {"metrics/eval/box_ap50": 0.4, "metrics/eval/recall": 1})]
    path = write_metrics(tmp_path / "metrics.jsonl", rows)
    with path.open("a") as file:
        file.write('{"step": 301, "metr')
    return path


def test_what_is_read(metrics: Path):
    found = read_curves(metrics)
    assert found["metrics/eval/box_ap50"] == ([150, 300], [0.1, 0.4])
    assert len(found["gradient_norm/llm"][0]) == 299 and 7 not in found["gradient_norm/llm"][0]
    assert not {"before", "text", "list"} & found.keys()
    again = write_metrics(metrics, [(3, {"a": 1}), (3, {"a": 2})])
    assert read_curves(again)["a"] == ([3], [2.0])


def test_an_image_of_the_panels_that_have_curves(metrics: Path, tmp_path: Path):
    DrawCurves(metrics, tmp_path / CURVES_FILE).fit_end(NOTHING, NOTHING)
    with Image.open(tmp_path / CURVES_FILE) as image:
        assert image.format == "PNG"
        width = image.size[0]  # of four panels
        assert len(set(image.convert("RGB").getdata())) > 50
    draw_curves({"lr/llm": ([0, 1], [1.0, 0.5])}, tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as image:
        assert image.size[0] == width / 4


def test_long_curves_are_means_of_20_steps(metrics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: dict[str, tuple[list[int], list[float]]] = {}

    class Axes:
        lines = ()

        def plot(self, steps: list[int], values: list[float], label: str, **keywords: Any) -> None:
            drawn[label] = (steps, values)

    line = ([*range(300)], [float(step) for step in range(300)])
    short = (line[0][:200], line[1][:200])
    assert curves._draw_panel(Axes(), {"long": line, "short": short}, False, False)
    assert not curves._draw_panel(Axes(), {"short": short}, False, False)
    assert drawn["short"] == (line[0][:200], line[1][:200])
    assert drawn["long"] == ([*range(19, 300)], [step - 9.5 for step in range(19, 300)])


@pytest.mark.parametrize("case", ["missing", "nothing", "not JSON", "no folder", "no matplotlib"])
def test_a_finished_run_stays_finished(
    metrics: Path, tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / CURVES_FILE
    if case == "missing":
        metrics.unlink()
    elif case == "nothing":
        write_metrics(metrics, [(0, {"other": 1.0})])
    elif case == "not JSON":
        metrics.write_bytes(b"\xff\x00")
    elif case == "no folder":
        path = tmp_path / "none" / CURVES_FILE
    else:
        monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    DrawCurves(metrics, path).fit_end(NOTHING, NOTHING)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{path} is not drawn (") and message.endswith("training is not affected")
    assert not path.exists()


@pytest.mark.parametrize(
    ("loggers", "read"),
    [
        ({"json_lines": {}}, "RUN/metrics.jsonl"),
        ({"json_lines": {"path": "other.jsonl"}}, "other.jsonl"),
        ({"json_lines": None}, None),
        ({}, None),
    ],
)
def test_a_run_without_the_file_has_no_curves(loggers: dict[str, Any], read: str | None):
    config = RecipeConfig(run_folder="RUN", loggers=loggers)
    config.train_loader.packing = None
    found = [item for item in build_all_callbacks(config, NOTHING) if isinstance(item, DrawCurves)]
    assert [(str(item.metrics), str(item.path)) for item in found] == (
        [] if read is None else [(read, "RUN/curves.png")]
    )
