"""The temporary files of a saver that uploads: removed at the end, and after a kill by the next run.

Composer 0.32 (`CheckpointSaver`, `RemoteUploader`): with a `save_folder` in a store, each rank writes its checkpoints
into a new temporary folder and copies them into another one to upload them. The first is never removed, and after a
SIGKILL neither: every start takes the room of some checkpoints from the disk. Delete once Composer removes both.
"""

import fcntl
import logging
import multiprocessing.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

PREFIX = "recipe-checkpoints-"
_LOCK = "lock"


class LocalCopies:
    """A folder in the temporary one, locked while this process lives."""

    def __init__(self):
        remove_dead_copies()
        multiprocessing.util.get_temp_dir()  # it is needed until the process ends, so it must not be in the folder
        made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))
        self._lock = _locked(made / _LOCK)
        assert self._lock is not None
        self.path = made.rename(made.with_name(made.name.removeprefix(".")))  # others may see it from here on

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Put the temporary files that are made meanwhile into the folder."""
        before = tempfile.tempdir
        tempfile.tempdir = str(self.path)
        try:
            yield
        finally:
            tempfile.tempdir = before

    def remove(self) -> None:
        """Remove the folder and all in it."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def remove_dead_copies() -> list[Path]:
    """Remove and return the folders of processes that have ended, whichever run they belonged to."""
    removed: list[Path] = []
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        lock = _locked(path / _LOCK)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
            removed.append(path)
    if removed:
        log.info("removed the local copies of checkpoints that %d killed processes left", len(removed))
    return removed


def _locked(path: Path) -> int | None:
    """Return the descriptor of a file that is now locked; None if another process holds it, or it is not ours."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file
