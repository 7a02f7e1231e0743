"""Local copies of checkpoints that go to a store: nothing of them stays, whether the run ends or is killed."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from recipe.checkpoints.check import Origin
from recipe.checkpoints.save import CheckpointSaver
from recipe.upstream.local_copies import PREFIX, LocalCopies, remove_dead_copies

KEPT = """
import time
from recipe.upstream.local_copies import LocalCopies
copies = LocalCopies()
(copies.path / "ba1.pt").write_text("a checkpoint")
print(copies.path, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, of the processes that are started too."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_copies_of_a_killed_process_are_removed_by_the_next(temporary: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KEPT], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    path = Path(process.stdout.readline().strip())
    assert path.parent == temporary and (path / "ba1.pt").exists()
    assert remove_dead_copies() == [], "it lives"
    own = LocalCopies()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.exists()
    assert remove_dead_copies() == [path] and not path.exists()
    assert own.path.exists(), "this process lives"
    own.remove()
    assert not list(temporary.glob(f"*{PREFIX}*"))


def test_a_folder_that_is_not_ours_stays(temporary: Path) -> None:
    link = temporary / f"{PREFIX}link"
    link.symlink_to("nowhere")
    assert remove_dead_copies() == [] and link.is_symlink()


def test_a_saver_keeps_all_in_one_folder_and_removes_it(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    saver = CheckpointSaver(Origin({}, "", ""), folder="s3://bucket/run", save_interval="1ba")
    (folder,) = temporary.glob(f"{PREFIX}*")
    assert Path(saver.folder).is_relative_to(folder) and str(saver.filename.folder).startswith(str(folder))
    assert saver.remote_uploader is not None
    assert Path(saver.remote_uploader._upload_staging_folder).is_relative_to(folder)
    assert os.path.isdir(tempfile.mkdtemp()) and tempfile.gettempdir() == str(temporary)
    saver.post_close()
    assert not list(temporary.glob(f"*{PREFIX}*"))
