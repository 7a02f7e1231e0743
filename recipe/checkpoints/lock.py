"""Let one live run at a time write into a folder.

A run holds a POSIX record lock (`fcntl.lockf`) on `LOCK_FILE` in its run folder: the system frees it when the process
ends, also by SIGKILL, workers do not inherit it, and NFS servers keep it for all clients. Some disks have no locks, or
one set per machine. Therefore the run also writes `BEAT_FILE` every `BEAT` seconds. If another machine wrote that last,
or there are no locks, the file is watched for `WATCH` seconds: if it changes, the other run lives.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from composer import Callback
from composer.core import State
from composer.loggers import Logger

from recipe.config import ConfigError
from recipe.upstream.agreement import from_rank_0

LOCK_FILE, BEAT_FILE = ".running.lock", ".running.json"
BEAT, WATCH = 2.0, 10.0

log = logging.getLogger(__name__)


class FolderLock:
    """Hold a run folder until `release` or the end of the process.

    Raises:
        ConfigError: Another run is alive in the folder.
    """

    def __init__(self, folder: str | Path, watch: float = WATCH, beat: float = BEAT):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        # Opened once: closing any handle of the file frees this process's lock.
        self._file = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        before, has_locks = self._read(), True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._refuse(before)
        except OSError:
            has_locks = False
        if before and not (has_locks and before.get("host") == socket.gethostname()):
            until = time.monotonic() + watch
            while time.monotonic() < until:
                time.sleep(watch / 20)
                if self._read() not in (before, {}):
                    self._refuse(before)
        self._number = 0
        self._has_ended = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._keep_beating, args=(beat,), daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let another run have the folder."""
        if not self._has_ended.is_set():
            self._has_ended.set()
            self._thread.join()
            (self.folder / BEAT_FILE).unlink(missing_ok=True)
            os.close(self._file)

    def _keep_beating(self, seconds: float) -> None:
        while not self._has_ended.wait(seconds):
            self._write()

    def _write(self) -> None:
        self._number += 1
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "number": self._number})
        try:
            (self.folder / BEAT_FILE).write_text(text)
        except OSError as error:
            log.debug("cannot write %s: %s", BEAT_FILE, error)  # a full disk ends no run

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / BEAT_FILE).read_text())
        except (OSError, ValueError):
            return {}

    def _refuse(self, other: dict[str, Any]) -> None:
        os.close(self._file)
        raise ConfigError(
            f"{self.folder} belongs to a run that is alive (process {other.get('pid', '?')} on "
            f"{other.get('host', 'an unknown machine')}): wait for its end or end it, or set another run_folder"
        )


class OneRunPerFolder(Callback):
    """Holds the run folder on rank 0 until the Trainer is closed; made by all ranks, before the model is built."""

    def __init__(self, folder: str):
        self._lock: FolderLock | None = None
        from_rank_0(lambda: self._take(folder))

    def close(self, state: State, logger: Logger) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            self._lock.release()

    def _take(self, folder: str) -> None:
        self._lock = FolderLock(folder)
