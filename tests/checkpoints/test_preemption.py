"""`recipe.checkpoints.sigterm` in one process; over processes: `test_survival.py`."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from composer import Callback, State

from recipe.checkpoints.check import newest_valid
from recipe.checkpoints.sigterm import PREEMPTED, Preemption
from tests.checkpoints.checkpoint_cases import AtBatch, make_saver, make_trainer


@pytest.fixture(autouse=True)
def own_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class AfterBatch(Callback):
    """As an evaluation: after the batch, before its checkpoint."""

    def batch_end(self, state: State, logger: Any) -> None:
        terminate()


@pytest.mark.parametrize("callback", [AtBatch(2, terminate), AfterBatch()])
def test_it_saves_at_the_end_of_the_batch(tmp_path: Path, callback: Callback) -> None:
    saver = make_saver(tmp_path, save_interval="100ba")
    trainer = make_trainer(saver, 9, None, (callback, Preemption(saver)))
    with pytest.raises(SystemExit) as left:
        trainer.fit()
    assert left.value.code == PREEMPTED
    batch = 3 if isinstance(callback, AtBatch) else 1
    found = newest_valid(str(tmp_path))
    assert found is not None and found.manifest.batch == batch
    trainer.close()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "the launcher's signal must not change the exit code"


def test_the_signal_is_handed_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    saver = make_saver(tmp_path)
    trainer = make_trainer(saver, 1, None, (Preemption(saver),))
    assert signal.getsignal(signal.SIGTERM) != before
    trainer.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_saves_and_the_second_ends_at_once(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    saver = make_saver(tmp_path, save_interval="100ba")
    found = []

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        found.append(signal.getsignal(signal.SIGINT))

    trainer = make_trainer(saver, 9, None, (AtBatch(2, interrupt), Preemption(saver)))
    try:
        with pytest.raises(SystemExit) as left:
            trainer.fit()
        trainer.close()
    finally:
        signal.signal(signal.SIGINT, before)
    assert left.value.code == PREEMPTED and found == [signal.SIG_DFL]
    newest = newest_valid(str(tmp_path))
    assert newest is not None and newest.manifest.batch == 3


def test_a_run_at_its_end_just_ends(tmp_path: Path) -> None:
    saver = make_saver(tmp_path)
    trainer = make_trainer(saver, 2, None, (AtBatch(1, terminate), Preemption(saver)))
    trainer.fit()
    trainer.close()


def test_one_checkpoint_where_one_is_due_anyway(tmp_path: Path) -> None:
    saver = make_saver(tmp_path)
    trainer = make_trainer(saver, 9, None, (AtBatch(1, terminate), Preemption(saver)))
    with pytest.raises(SystemExit):
        trainer.fit()
    trainer.close()
    assert len(saver.saved_checkpoints) == 2


def test_without_a_checkpoint_it_does_not_say_preempted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipe.checkpoints.save.num_bytes", lambda content: 10**18)
    saver = make_saver(tmp_path, save_interval="100ba")
    trainer = make_trainer(saver, 9, None, (AtBatch(1, terminate), Preemption(saver)))
    with pytest.raises(RuntimeError, match=r"no checkpoint of batch 2 could be written: .* bytes free"):
        trainer.fit()
    trainer.close()
