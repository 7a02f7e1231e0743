"""The JSON-lines logger: valid JSON whatever is logged, appended on resume, rank 0 only."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from composer.utils import dist

from recipe.callbacks.json_lines import JsonLinesLogger


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_each_call_is_one_line_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    logger = JsonLinesLogger(str(path))
    logger.log_metrics({"before": 1}, step=0)
    state = SimpleNamespace(timestamp=SimpleNamespace(epoch=SimpleNamespace(value=4)))
    logger.init(cast(Any, state), cast(Any, None))
    logger.log_metrics({"loss": torch.tensor(0.5), "ap": torch.tensor([0.25]), "n": np.int64(3)}, step=7)
    first, second = read(path)
    assert first["epoch"] is None
    assert (second["step"], second["epoch"]) == (7, 4)
    assert second["time"] >= first["time"]
    assert second["metrics"] == {"loss": 0.5, "ap": 0.25, "n": 3}


def test_not_a_number_stays_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    values = {"a": math.nan, "b": torch.tensor(math.inf), "c": np.float32(-math.inf), "d": [1.0, math.nan]}
    JsonLinesLogger(str(path)).log_metrics({**values, "text": "x", "flag": True}, step=1)
    metrics = read(path)[0]["metrics"]
    assert metrics == {"a": "nan", "b": "inf", "c": "-inf", "d": [1.0, "nan"], "text": "x", "flag": True}
    assert math.isnan(float(metrics["a"]))


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(2):
        logger = JsonLinesLogger(str(path))
        logger.log_metrics({"loss": step}, step=step)
        logger.close(cast(Any, None), cast(Any, None))
    assert [line["step"] for line in read(path)] == [0, 1]


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_global_rank", lambda: 1)
    JsonLinesLogger(str(tmp_path / "metrics.jsonl")).log_metrics({"loss": 1}, step=1)
    assert not list(tmp_path.iterdir())
