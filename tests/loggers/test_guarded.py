"""A logger may fail, the run may not."""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from composer.core import Event
from composer.loggers import LoggerDestination

from recipe.callbacks.loggers import GuardedJsonLinesLogger, TextLogger
from recipe.upstream import loggers as guarded
from recipe.upstream.loggers import GuardedLogger
from tests.launches.launch import run_composer

NOTHING = cast(Any, None)


class Broken(LoggerDestination):
    """Fails at every call for as long as `error` is set."""

    def __init__(self) -> None:
        self.error: Exception | None = OSError("cannot write https://user:letmein@host/log")
        self.calls: list[Any] = []

    def _note(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(args)
        if self.error:
            raise self.error

    log_metrics = log_hyperparameters = log_table = log_images = log_traces = upload_file = close = batch_end = _note


class GuardedBroken(GuardedLogger, Broken):
    pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(guarded.time, "monotonic", lambda: now.seconds)
    return now


def test_every_kind_of_call_is_guarded(clock: SimpleNamespace) -> None:
    logger = GuardedBroken()
    calls = [
        lambda: logger.log_metrics({"a": 1}, 0),
        lambda: logger.log_hyperparameters({"a": 1}),
        lambda: logger.log_table(["a"], [[1]]),
        lambda: logger.log_images(np.zeros((2, 2))),
        lambda: logger.log_traces({}),
        lambda: logger.upload_file(NOTHING, "a", Path("b"), overwrite=True),
        lambda: logger.run_event(Event.BATCH_END, NOTHING, NOTHING),
        lambda: logger.close(NOTHING, NOTHING),
    ]
    for number, call in enumerate(calls, start=1):
        call()
        assert len(logger.calls) == number, "the call did not reach the logger"
        clock.seconds += guarded.REST


def test_one_warning_then_rest_then_another_try(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    logger = GuardedBroken()
    for _ in range(5):
        logger.log_metrics({"a": 1}, 0)
    assert len(logger.calls) == 1
    (record,) = caplog.records
    assert "GuardedBroken failed" in record.message
    assert "OSError: cannot write https://<redacted>@host/log" in record.message

    logger.error = None
    clock.seconds += guarded.REST
    logger.log_metrics({"b": 2}, 1)
    assert logger.calls[-1] == ({"b": 2}, 1)
    logger.close(NOTHING, NOTHING)
    assert [record.message for record in caplog.records[1:]] == ["GuardedBroken lost 5 calls of this run"]


def test_hyperparameters_lose_their_secrets() -> None:
    logger = GuardedBroken()
    logger.log_hyperparameters({"api_key": "sesame", "remote": "s3://KEY:SECRET@host/a", "lr": 0.1})
    assert logger.calls == [({"api_key": "<redacted>", "remote": "s3://<redacted>@host/a", "lr": 0.1},)]


@pytest.fixture
def restored_streams() -> Iterator[None]:
    """Composer's file logger replaces `write` of both streams."""
    yield
    for stream in (sys.stdout, sys.stderr):
        vars(stream).pop("write", None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_ends_no_run(restored_streams: None, caplog: pytest.LogCaptureFixture) -> None:
    state = cast(Any, SimpleNamespace(run_name="run"))
    json_lines, text = GuardedJsonLinesLogger("/dev/full"), TextLogger(filename="/dev/full")
    with caplog.at_level(logging.WARNING):
        text.run_event(Event.INIT, state, NOTHING)
        for logger in (json_lines, text):
            for step in range(3):
                logger.log_metrics({"loss": 1.0}, step)
        print("a line that the text log cannot take")
    warned = [record.message.split(" failed")[0] for record in caplog.records]
    assert warned == ["GuardedJsonLinesLogger", "TextLogger"]


def test_the_text_log_is_appended_and_holds_no_secret(tmp_path: Path, restored_streams: None) -> None:
    path = tmp_path / "log.txt"
    for run in ("first", "second"):
        logger = TextLogger(filename=str(path))
        logger.run_event(Event.INIT, cast(Any, SimpleNamespace(run_name="run")), NOTHING)
        logger.log_metrics({run: 1.0}, 0)
        print("from s3://KEY:SECRET@host/a with api_key=sesame")
        logger.close(NOTHING, cast(Any, SimpleNamespace(upload_file=lambda *args, **kwargs: None)))
    text = path.read_text()
    assert text.index("first: 1.0") < text.index("second: 1.0")
    assert "SECRET" not in text
    assert "sesame" not in text


@pytest.mark.slow
def test_training_does_not_notice_a_full_disk(tmp_path: Path) -> None:
    """Real files of all three loggers, TensorBoard's with its writing thread."""
    script = Path(__file__).with_name("full_disk_run.py")
    outputs = [run_composer(1, script, str(tmp_path / limit), limit).output for limit in ("0", "200")]
    unbounded, full = (json.loads((tmp_path / limit / "trained.json").read_text()) for limit in ("0", "200"))
    assert full == unbounded
    for name in ("GuardedJsonLinesLogger", "GuardedTensorboardLogger", "TextLogger"):
        assert [output.count(f"{name} failed") for output in outputs] == [0, 1]
