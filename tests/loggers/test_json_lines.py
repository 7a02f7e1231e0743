"""The JSON-lines logger: valid JSON whatever is logged, every batch once after a resume, rank 0 only."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from composer.core import Timestamp
from composer.utils import dist

from recipe.callbacks.loggers import JsonLinesLogger


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


NO_LOGGER = cast(Any, None)


def state_at(batch: int, epoch: int = 0) -> Any:
    return SimpleNamespace(timestamp=Timestamp(epoch=epoch, batch=batch))


def log_batches(logger: JsonLinesLogger, start: int, stop: int) -> None:
    """As Composer does: within batch n at step n, after it at step n + 1, evaluated after every batch."""
    logger.init(state_at(start), NO_LOGGER)
    logger.fit_start(state_at(start), NO_LOGGER)
    for batch in range(start, stop):
        logger.init(state_at(batch), NO_LOGGER)
        logger.after_dataloader(state_at(batch), NO_LOGGER)
        logger.log_metrics({"loss": batch}, step=batch)
        logger.init(state_at(batch + 1), NO_LOGGER)
        logger.log_metrics({"lr": batch + 1}, step=batch + 1)
        logger.log_metrics({"ap": batch + 1}, step=batch + 1)


def values(path: Path) -> list[tuple[str, int]]:
    return [entry for line in read(path) for entry in line["metrics"].items()]


def test_each_call_is_one_line_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    logger = JsonLinesLogger(str(path))
    logger.log_metrics({"before": 1}, step=0)
    logger.init(state_at(batch=7, epoch=4), NO_LOGGER)
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


def test_a_table_is_one_line(tmp_path: Path) -> None:
    logger = JsonLinesLogger(str(tmp_path / "metrics.jsonl"))
    logger.log_table(["category", "ap"], [["a cup", 0.5], ["a dog", math.nan]], name="eval/categories", step=3)
    logger.log_table(["one"], [[1]], name="other", step=4)
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["step"], first["metrics"], first["table"]) == (3, {}, "eval/categories")
    assert (first["columns"], first["rows"]) == (["category", "ap"], [["a cup", 0.5], ["a dog", "nan"]])
    assert second["rows"] == [[1]]


def test_a_resumed_run_holds_every_batch_once(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "metrics.jsonl"
    log_batches(JsonLinesLogger(str(whole)), 0, 6)
    log_batches(JsonLinesLogger(str(resumed)), 0, 4)  # killed without a close, after batch 3
    log_batches(JsonLinesLogger(str(resumed)), 2, 6)  # from the checkpoint of two batches
    assert values(resumed) == values(whole)
    replaced = tmp_path / "metrics.jsonl.replaced"
    assert values(replaced) == [("loss", 2), ("lr", 3), ("ap", 3), ("loss", 3), ("lr", 4), ("ap", 4)]


def test_a_run_begun_anew_sets_the_old_lines_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log_batches(JsonLinesLogger(str(path)), 0, 2)
    with path.open("a") as file:
        file.write('{"step": 2, "met')  # the disk was full
    log_batches(JsonLinesLogger(str(path)), 0, 1)
    assert values(path) == [("loss", 0), ("lr", 1), ("ap", 1)]
    assert len((tmp_path / "metrics.jsonl.replaced").read_text().splitlines()) == 7


def test_nothing_is_moved_without_need(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log_batches(JsonLinesLogger(str(path)), 0, 2)
    log_batches(JsonLinesLogger(str(path)), 2, 3)
    assert [line["step"] for line in read(path)] == [0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_global_rank", lambda: 1)
    JsonLinesLogger(str(tmp_path / "metrics.jsonl")).log_metrics({"loss": 1}, step=1)
    assert not list(tmp_path.iterdir())
