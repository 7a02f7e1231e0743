"""Processes that upload: one that is killed is replaced and its upload repeated; none outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import pytest

from recipe.upstream.upload_processes import MOST_TIMES, UploadProcesses

PARENT = """
import sys, time
from recipe.upstream.upload_processes import UploadProcesses
if __name__ == "__main__":
    processes = UploadProcesses(1)
    processes.submit(time.sleep, 600)
    while not processes._pools[0]._processes:
        time.sleep(0.01)
    print(*processes._pools[0]._processes, flush=True)
    time.sleep(600)
"""


def upload(log: Path, num_kills: int) -> int:
    """Note this attempt; be killed in the first ones."""
    with log.open("a") as file:
        print(os.getpid(), file=file)
    attempt = len(log.read_text().splitlines())
    if attempt <= num_kills:
        os.kill(os.getpid(), signal.SIGKILL)
    return attempt


def test_uploads_continue_after_sigterm() -> None:
    with UploadProcesses(1) as processes:
        assert processes.submit(signal.getsignal, signal.SIGTERM).result() == signal.SIG_IGN


def test_a_killed_process_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of two, one is killed in the middle of an upload, then the other one while it waits for work."""
    with UploadProcesses(2) as processes:
        slow = processes.submit(time.sleep, 2)
        assert processes.submit(upload, tmp_path / "one", 1).result(60) == 2
        slow.result(60)
        assert "killed: the upload begins again" in caplog.text
        idle = [processes.submit(os.getpid), processes.submit(os.getpid)]
        wait(idle)
        for future in idle:
            os.kill(future.result(), signal.SIGKILL)
        assert processes.submit(upload, tmp_path / "two", 0).result(60) == 1
    assert not [each for each in psutil.Process().children() if each.is_running() and "spawn_main" in each.cmdline()]


def test_what_kills_its_process_each_time_fails(tmp_path: Path) -> None:
    with UploadProcesses(1) as processes:
        failed = processes.submit(upload, tmp_path / "log", MOST_TIMES)
        assert isinstance(failed.exception(60), BrokenProcessPool)
        assert processes.submit(upload, tmp_path / "log", 0).result(60) == MOST_TIMES + 1


def test_an_error_is_passed_on() -> None:
    with UploadProcesses(1) as processes, pytest.raises(ValueError, match="a letter"):
        processes.submit(int, "a letter").result(60)


def test_ends_with_its_parent(tmp_path: Path) -> None:
    """In the middle of an upload, so that a run that has resumed is the only one that writes."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    uploading = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    gone, _ = psutil.wait_procs([uploading], timeout=60)
    assert gone
