"""`recipe.callbacks.progress`: what a run says on the console."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from recipe.callbacks.progress import LINE_EVERY, headline, short, shown
from recipe.callbacks.summary import FEW_STEPS
from recipe.checkpoints.weights import find_config
from recipe.train import main as train


@pytest.mark.parametrize(
    ("value", "expected"), [(-1.0, "-"), (0.0, "0.000"), (1.0, "1.000"), (0.12345, "0.123"), (42.0, "42")]
)
def test_scores_as_text(value: float, expected: str):
    assert shown(value) == expected


def test_the_headline_holds_what_was_measured_in_one_order():
    scores = {"text_f1": -1.0, "ece": 0.2, "box_ap50": 0.9567, "caption_match": 0.5}
    assert headline(scores) == "box AP50 0.957, captions right 0.500, F1 of text answers -"


@pytest.mark.parametrize(
    ("number", "expected"), [(7, "7"), (1234, "1.23 k"), (1_234_567, "1.23 M"), (3_750_000_000, "3.75 B")]
)
def test_short_numbers(number: int, expected: str):
    assert short(number) == expected


def test_a_run_says_what_it_does_and_what_it_did(
    trained_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Without a terminal: the first step and every twentieth have a line, and so has each evaluation."""
    caplog.set_level(logging.INFO, logger="recipe")
    monkeypatch.setattr("recipe.callbacks.progress.LONGEST_SILENCE", float("inf"))
    config = find_config(trained_checkpoint)
    config = replace(config, run_folder=str(tmp_path / "run"), trainer={**config.trainer, "progress_bar": True})
    train(config).close()
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("recipe.callbacks.")]
    messages = messages[[message.startswith("this run\n") for message in messages].index(True) :]
    first, last = messages[0], messages[-1]
    assert f"writes      {config.run_folder}" in first
    assert "parameters" in first and "evaluation every" in first
    assert (
        "seen        each image 1 times" in first and "2ba = 2 steps, the head learns in 2; evaluation every" in first
    )
    assert messages[1].startswith(f"the head learns in 2 steps, a new one needs {FEW_STEPS} or more: raise")
    steps = [message for message in messages if message.startswith("step ")]
    assert len(steps) == 1 and steps[0].startswith("step 1 (50 %), loss ") and LINE_EVERY > 2
    assert [message for message in messages if message.startswith("evaluation at step 2: box AP50 ")]
    assert last.splitlines()[0] == "this run has ended" and len(last.splitlines()) == 7
    assert re.search(r"memory      peak [\d.]+ GiB per process", last)
    assert "done        step 2 after" in last
    assert f"--checkpoint {config.run_folder}/checkpoints/latest-rank0.pt" in last


def test_progress_within_an_epoch_counts(
    trained_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Two epochs of two steps."""
    caplog.set_level(logging.INFO, logger="recipe")
    monkeypatch.setattr("recipe.callbacks.progress.LINE_EVERY", 1)
    config = find_config(trained_checkpoint)
    trainer = {**config.trainer, "progress_bar": True, "max_duration": "2ep", "eval_interval": "2ep"}
    train(replace(config, run_folder=str(tmp_path / "run"), trainer=trainer)).close()
    lines = [message for record in caplog.records if (message := record.getMessage()).startswith("step ")]
    assert [re.sub(r"\).*", ")", line) for line in lines] == [f"step {n} ({25 * n} %)" for n in range(1, 5)]
    assert all(" left" in line for line in lines[:3]) and " left" not in lines[3]
