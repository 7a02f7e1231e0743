"""A loader's worker that is killed ends all ranks soon, though the others wait for it and `dist_timeout` is far."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from composer.utils import dist
from torch.utils.data import Dataset

from recipe.data.loader import obey_only_parent
from recipe.upstream import killed_worker
from recipe.upstream.agreement import LockstepLoader
from tests.launches.launch import run_composer

MODES = ("waits", "reads", "raises", "persistent")


class Numbers(Dataset[int]):
    """0 to 7; of the last rank, the worker that reads number 3 is killed; of the others, none ever reads it.

    The others' workers wait, as Streaming's do for a shard that the killed one was fetching.

    Args:
        delay: Seconds before the kill.
        patience: Seconds that the others wait.
    """

    def __init__(self, delay: float = 0.0, patience: float = 600.0, number: signal.Signals = signal.SIGKILL):
        self.delay, self.patience, self.number = delay, patience, number

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index == 3:
            if dist.get_global_rank() < dist.get_world_size() - 1:
                time.sleep(self.patience)
            time.sleep(self.delay)
            os.kill(os.getpid(), self.number)
        return index


def one_rank(mode: str) -> None:
    """`waits`: in the collective for the other rank; `reads`: for the killed worker; `raises`: in a step."""
    dist.initialize_dist("cpu", timeout=600)
    killed_worker.PATIENCE = 2
    delay = 3.0 if mode == "waits" else 0.0
    workers: Any = {"num_workers": 2, "prefetch_factor": 4, "persistent_workers": mode == "persistent"}
    # With `waits` one worker of each rank has read all that comes before number 3.
    loader = LockstepLoader(Numbers(delay), batch_size=1, worker_init_fn=obey_only_parent, **workers)
    for _ in loader:
        if mode == "raises":
            time.sleep(600)


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize("mode", MODES)
def test_all_ranks_end(mode: str):
    started = time.monotonic()
    launch = run_composer(2, __file__, mode, timeout=120, check=False)
    assert time.monotonic() - started < 60
    assert launch.returncode
    assert "was killed by SIGKILL, probably because memory ran out. Lower num_workers" in launch.output


def read_all(dataset: Numbers) -> list[int]:
    loader: Any = LockstepLoader(dataset, num_workers=1, worker_init_fn=obey_only_parent)
    return [int(number) for number in loader]


@pytest.fixture
def alarms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    monkeypatch.setattr(signal, "alarm", found.append)
    return found


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (signal.SIGKILL, "Lower num_workers or prefetch_factor (train_loader.dataloader"),
        (signal.SIGBUS, "Enlarge it (docker: --shm-size)"),
        (signal.SIGSEGV, "a fault in a library that it uses"),
    ],
)
def test_alone_it_says_what_to_lower(number: signal.Signals, remedy: str, alarms: list[int]):
    with pytest.raises(RuntimeError) as raised:
        read_all(Numbers(number=number))
    assert f"was killed by {number.name}" in str(raised.value) and remedy in str(raised.value)
    wait_until(lambda: alarms == [killed_worker.PATIENCE])


def test_a_status_that_another_thread_collects_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    """`join` in the main thread collects it first and notes the exit code after."""

    class Collected:
        pid = 1
        codes = iter([None, None, -signal.SIGBUS])

        @property
        def exitcode(self) -> int | None:
            return next(self.codes, -signal.SIGBUS)

    def refuse(*args: Any) -> None:
        raise ChildProcessError

    monkeypatch.setattr(os, "waitid", refuse)
    worker: Any = Collected()
    assert killed_worker._signal_of(worker, 0) == signal.SIGBUS


def test_workers_that_end_as_they_should_raise_no_alarm(alarms: list[int]):
    class Whole(Numbers):
        def __getitem__(self, index: int) -> int:
            return index

    assert read_all(Whole()) == list(range(8))
    batches: Iterator[Any] = iter(LockstepLoader(Whole(), num_workers=2, worker_init_fn=obey_only_parent))
    next(batches)
    del batches  # torch ends the workers of a loop that is left
    time.sleep(1)
    assert not alarms


def test_a_worker_ends_with_its_parent(tmp_path: Path):
    script = "import sys; from tests.upstream.test_killed_worker import *; hold(sys.argv[1])"
    path = tmp_path / "worker"
    parent = psutil.Popen([sys.executable, "-c", script, str(path)])
    wait_until(path.exists, 60)
    worker = psutil.Process(int(path.read_text()))
    parent.kill()
    parent.wait(5)
    worker.wait(15)


class Held(Dataset[int]):
    """Its worker tells its process id, then waits as long as it lives."""

    def __init__(self, path: str):
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        Path(self.path + ".new").write_text(str(os.getpid()))
        os.rename(self.path + ".new", self.path)
        time.sleep(600)
        return index


def hold(path: str) -> None:
    loader: Any = LockstepLoader(Held(path), num_workers=1, worker_init_fn=obey_only_parent)
    list(loader)


def wait_until(holds: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


if __name__ == "__main__":
    one_rank(sys.argv[1])
