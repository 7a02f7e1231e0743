"""`recipe.data.loader`: a real worker of a DataLoader, and SIGTERM from others and from its parent."""

import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from torch.utils.data import DataLoader

from recipe.data.loader import obey_only_parent


class Pids:
    """A data set that tells who reads it."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        return os.getpid()


@pytest.fixture
def batches() -> Iterator[Any]:
    loader: Any = DataLoader(Pids(), num_workers=1, prefetch_factor=1, worker_init_fn=obey_only_parent)  # pyright: ignore
    yield iter(loader)


def test_another_process_does_not_end_a_worker(batches: Any) -> None:
    worker = int(next(batches))
    subprocess.run(["kill", "-TERM", str(worker)], check=True)
    assert [int(pid) for pid in batches] == [worker] * 5


def test_its_parent_does(batches: Any) -> None:
    worker = psutil.Process(int(next(batches)))
    os.kill(worker.pid, signal.SIGTERM)
    worker.wait(5)
