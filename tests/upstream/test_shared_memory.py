"""What a SIGKILL leaves, that it is removed, and that the living are spared."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import pytest
from streaming import MDSWriter

import recipe.upstream.shared_memory as shared_memory
from recipe.upstream.shared_memory import SEGMENTS, clean_dead_shared_memory

pytestmark = pytest.mark.skipif(not SEGMENTS.is_dir(), reason="this system has no /dev/shm")

HOLDER = """
import sys, time
from streaming import StreamingDataset
from tests.support.segments import number_segments_apart
number_segments_apart(int(sys.argv[4]))
rows = StreamingDataset(remote=sys.argv[1], local=sys.argv[2], batch_size=4)
next(iter(rows))
print(f"{rows._shm_prefix_int:06}", flush=True)
time.sleep(float(sys.argv[3]))
"""
Hold = Callable[..., tuple[subprocess.Popen, str]]


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hold]:
    """Starts a process that holds a data set whose cache is `local`; returns it and its number, or its last line."""
    with MDSWriter(out=str(tmp_path / "rows"), columns={"number": "int"}) as writer:
        for number in range(8):
            writer.write({"number": number})
    with ExitStack() as processes:

        def start(local: str, temporary: str, seconds: int = 120) -> tuple[subprocess.Popen, str]:
            (tmp_path / temporary).mkdir(exist_ok=True)
            # One place for all of them, where no other test's process frees a number meanwhile.
            arguments = [tmp_path / "rows", tmp_path / local, seconds, os.getpid() + 500]
            process = subprocess.Popen(
                [sys.executable, "-c", HOLDER, *map(str, arguments)],
                env={**os.environ, "TMPDIR": str(tmp_path / temporary)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            processes.callback(kill, process)
            assert process.stdout is not None
            lines = [process.stdout.readline()] if seconds else process.stdout.readlines()
            return process, lines[-1].strip()

        yield start


def kill(process: subprocess.Popen) -> None:
    """The whole run with SIGKILL, its resource tracker too, which would clean up after its main process."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def segments(number: str) -> list[str]:
    return sorted(path.name for path in SEGMENTS.glob(f"{number}_*"))


@pytest.mark.slow
def test_a_killed_run_is_cleaned_up_after_and_a_living_one_is_spared(
    tmp_path: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch
):
    living, kept = hold("cache-of-the-living", "temporary")
    dead, number = hold("cache", "temporary")
    kill(dead)
    left = segments(number)
    assert len(left) == 6, left
    assert "Reused local directory" in hold("cache", "emptied", 0)[1], "what its leftovers do where no lock file is"

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert not {Path(path).name[:6] for path in clean_dead_shared_memory()} & {number, kept}, (
        "all are younger than 30 s"
    )
    # Long enough that no other test's segment is still unmapped.
    monkeypatch.setattr(shared_memory, "YOUNGEST", 2.0)
    time.sleep(2.1)
    before = segments(kept)
    removed = clean_dead_shared_memory()
    assert {Path(path).name for path in removed} >= {*left, f"{number}_barrier_filelock", f"{number}_cache_filelock"}
    assert segments(number) == []
    assert segments(kept) == before != []
    assert (tmp_path / "temporary" / f"{kept}_cache_filelock").exists()
    assert living.poll() is None
    assert hold("cache", "emptied", 0)[1].isdigit(), "the next run starts"


def test_only_the_dead_of_this_user_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shm, temporary, processes = tmp_path / "shm", tmp_path / "temporary", tmp_path / "proc"
    for folder in (shm, temporary, processes / "self", processes / "17"):
        folder.mkdir(parents=True)
    (processes / "self" / "maps").touch()
    for name in ("sem.mp-alive_12", "sem.mp-dead__12", "sem.other"):
        (shm / name).touch()
    inode = (shm / "sem.mp-alive_12").stat().st_ino
    (processes / "17" / "maps").write_text(
        f"7f00-7f01 rw-s 00000000 00:19 5 {shm}/000002_locals\n7f02-7f03 rw-s 0 00:19 6 {shm}/another\n"
        f"7f04-7f05 rw-s 0 00:19 {inode}                      {shm}/sem.Ube9Pr (deleted)\n"
    )
    for name in ("000001_locals", "000002_locals", "000002_barrier", "000003_locals", "another", "000001_other"):
        (shm / name).touch()
    for name in ("000001_cache_filelock", "000002_cache_filelock", "000004_barrier_filelock", "other_filelock"):
        (temporary / name).touch()
    monkeypatch.setattr(shared_memory, "SEGMENTS", shm)
    monkeypatch.setattr(shared_memory, "PROCESSES", processes)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert clean_dead_shared_memory() == [], "too young"

    status = (shm / "000003_locals").stat()
    later = max(status.st_mtime, status.st_ctime) + 60
    monkeypatch.setattr(shared_memory.time, "time", lambda: later)
    os.utime(shm / "000003_locals", (later, later))
    removed = clean_dead_shared_memory()
    assert sorted(removed) == [
        str(shm / "000001_locals"),
        str(shm / "sem.mp-dead__12"),
        str(temporary / "000001_cache_filelock"),
        str(temporary / "000004_barrier_filelock"),
    ]
    monkeypatch.setattr(shared_memory.os, "getuid", lambda: -1)
    (shm / "000001_locals").touch()
    monkeypatch.setattr(shared_memory.time, "time", lambda: later + 999)
    assert clean_dead_shared_memory() == []


def test_a_semaphore_whose_process_has_not_started_yet_is_spared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Under load the process of an uploader takes longer than 30 s; until then only its parent has the semaphores."""
    lock = get_context("spawn").Lock()
    name = f"sem.{lock._semlock.name.strip('/')}"  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(shared_memory, "_SEGMENT_NAME", re.compile(rf"(\d{{6}})_none|({re.escape(name)})"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(shared_memory, "YOUNGEST", 0.0)
    assert clean_dead_shared_memory() == [] and (SEGMENTS / name).exists()


def test_other_systems_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared_memory, "PROCESSES", tmp_path)
    assert clean_dead_shared_memory() == []
