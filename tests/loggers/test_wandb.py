"""W&B never ends, hangs or slows a run, however ill its server is: real processes, servers on loopback."""

import json
import random
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from composer.core import Event
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

from recipe.upstream.wandb_logger import SafeWandBLogger, ask_server, within
from tests.launches.launch import run_composer
from tests.loggers.wandb_run import FINISH_SECONDS, NUM_BATCHES, PROBE_SECONDS, START_SECONDS
from tests.loggers.wandb_server import ILLS, wandb_server

KEY = "0123456789" * 4
MARGIN = 10.0  # seconds for imports and the start of wandb's process, on a busy machine


def launch(folder: Path, address: str, world_size: int = 1, last_batch: int = 0) -> tuple[dict[str, Any], str]:
    env = {"WANDB_BASE_URL": address, "WANDB_API_KEY": KEY, "WANDB_MODE": "online", "NO_PROXY": "127.0.0.1"}
    script = Path(__file__).with_name("wandb_run.py")
    output = run_composer(world_size, script, str(folder), str(last_batch), env=env, timeout=400).output
    return json.loads((folder / "report.json").read_text()), output


def logged_steps(folder: Path) -> int:
    """Of the run's own file, which `wandb sync` sends; it is read to its last record."""
    (path,) = folder.glob("wandb/latest-run/*.wandb")
    store, kinds = DataStore(), Counter[str]()
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record: Any = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kinds[record.WhichOneof("record_type")] += 1
    return kinds["history"]


def test_a_call_is_waited_for_so_long() -> None:
    within(5, lambda: None)
    with pytest.raises(KeyError):
        within(5, lambda: {}["a"])
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        within(0.05, threading.Event().wait)


def test_the_numbers_of_a_step_are_one_call_of_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, next to tables and images; what is left is sent at the end of an evaluation and of the run."""
    calls: list[Any] = []
    monkeypatch.setattr(wandb, "log", lambda row, step: calls.append((row, step)))
    monkeypatch.setattr(wandb, "Table", lambda columns, rows: len(rows))
    logger: Any = SafeWandBLogger(rank_zero_only=False)
    logger.log_metrics({"a": 1, "b": 2}, 3)
    logger.log_metrics({"b": 4, "c": 5}, 3)
    assert calls == []
    logger.log_metrics({"a": 6}, 4)
    logger.log_table(["x"], [[7]], "t", 4)
    logger.log_metrics({"a": 8}, 4)
    logger.run_event(Event.BATCH_END, None, None)
    assert len(calls) == 3
    logger.run_event(Event.EVAL_END, None, None)
    logger.log_metrics({"a": 9}, 5)
    logger.close(None, None)
    assert calls == [({"a": 1, "b": 4, "c": 5}, 3), ({"a": 6}, 4), ({"t": 1}, 4), ({"a": 8}, 4), ({"a": 9}, 5)]


@pytest.mark.parametrize("ill", [None, "refused", "401", "500", "silent"])
def test_the_server_is_asked_first(ill: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr("recipe.upstream.wandb_logger.PROBE_SECONDS", 0.5)
    with wandb_server(ill) as address:
        monkeypatch.setattr(wandb.api, "settings", lambda name: address)
        if ill is None:
            ask_server()
        else:
            with pytest.raises(OSError):  # requests' errors are
                ask_server()


@pytest.mark.slow
@pytest.mark.parametrize("ill", ILLS)
def test_an_ill_server_means_offline(ill: str, tmp_path: Path) -> None:
    with wandb_server(ill) as address:
        report, output = launch(tmp_path, address, world_size=2 if ill == "silent" else 1)
    assert report["mode"] == "offline"
    assert report["start"] < PROBE_SECONDS + MARGIN + (START_SECONDS if ill == "cannot open runs" else 0)
    assert output.count("W&B cannot be used as configured, so its mode is now offline") == 1
    assert "wandb sync" in output
    assert logged_steps(tmp_path) >= NUM_BATCHES
    assert KEY not in output


@pytest.mark.slow
@pytest.mark.parametrize("last_batch", [0, 20])
def test_a_server_that_dies_is_not_noticed(last_batch: int, tmp_path: Path) -> None:
    with wandb_server() as address:
        report, output = launch(tmp_path, address, last_batch=last_batch)
    assert report["mode"] == "online"
    assert report["slowest_batch"] < 1
    assert report["close"] < FINISH_SECONDS + MARGIN
    assert ("W&B did not receive the whole run" in output) == bool(last_batch)
    assert logged_steps(tmp_path) >= NUM_BATCHES


def test_the_end_of_a_run_draws_no_random_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wandb draws while it waits for its service."""
    logger = SafeWandBLogger(init_kwargs={"mode": "offline"})
    monkeypatch.setattr("wandb.run", SimpleNamespace(dir=str(tmp_path / "run" / "files")))
    monkeypatch.setattr("wandb.finish", lambda status: random.random())
    before = random.getstate()
    logger.post_close()
    assert random.getstate() == before
