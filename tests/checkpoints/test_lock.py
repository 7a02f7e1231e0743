"""`recipe.checkpoints.lock`: one live run per folder, over processes and machines."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from recipe.checkpoints.lock import BEAT_FILE, FolderLock

HOLD = "import sys, time; from recipe.checkpoints.lock import FolderLock; FolderLock(sys.argv[1]); print(flush=True); "
FORK = "import os; os.fork(); "  # a worker that outlives its parent must not keep the folder


@pytest.mark.parametrize("fork", ["", FORK])
def test_refused_while_the_other_lives_and_free_after_its_kill(tmp_path: Path, fork: str) -> None:
    command = [sys.executable, "-c", HOLD + fork + "time.sleep(20)", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(ValueError, match=rf"belongs to a run that is alive \(process {other.pid} on .*run_folder"):
            FolderLock(tmp_path)
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        started = time.monotonic()
        FolderLock(tmp_path).release()
        assert time.monotonic() - started < 1
        with suppress(ProcessLookupError):
            os.killpg(other.pid, signal.SIGKILL)


def test_given_back_at_the_end(tmp_path: Path) -> None:
    FolderLock(tmp_path).release()
    assert not (tmp_path / BEAT_FILE).exists()
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("has_locks", [True, False])
@pytest.mark.parametrize("lives", [True, False])
def test_another_machine_is_seen_by_what_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool, lives: bool
) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if not has_locks:
        monkeypatch.setattr(fcntl, "lockf", no_locks)
    (tmp_path / BEAT_FILE).write_text('{"host": "other", "pid": 7, "number": 1}')
    again = threading.Timer(0.2, (tmp_path / BEAT_FILE).write_text, ['{"host": "other", "pid": 7, "number": 2}'])
    if lives:
        again.start()
        with pytest.raises(ValueError, match="process 7 on other"):
            FolderLock(tmp_path, watch=1.0)
    else:
        FolderLock(tmp_path, watch=1.0).release()
