"""Let one live run at a time write into a folder.

A run holds a POSIX record lock (`fcntl.lockf`) on `FILE` in its run folder, and changes the file's content every
`BEAT` seconds. The system frees the lock when the process ends, also by SIGKILL, and workers do not inherit it. NFS
servers keep such locks for all clients. On a disk that has none, or keeps them per machine, the content decides: if it
changes within `WATCH` seconds, the other run lives. It is watched only if another machine wrote it, or without locks.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path

FILE = "running.lock"
BEAT = 2.0
WATCH = 8.0

log = logging.getLogger(__name__)


class FolderLock:
    """Hold a run folder until `release` or the end of the process.

    Raises:
        ValueError: Another run is alive in the folder.
    """

    def __init__(self, folder: str | Path, watch: float = WATCH, beat: float = BEAT):
        self.path = Path(folder, FILE)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self._read()  # not while locked: closing any handle of a file frees this process's lock
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        has_locks = True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._refuse(before)
        except OSError as error:
            has_locks = False
            log.warning("%s has no locks (%s): other runs in it are found by what they write", folder, error.strerror)
        self._number = 0
        is_from_here = before.get("host") == socket.gethostname()
        if before and not (has_locks and is_from_here) and not before.get("ended"):
            self._watch(before, watch)
        self._ended = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._beat, args=(beat,), daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let another run have the folder."""
        self._ended.set()
        self._thread.join()
        self._write(ended=True)
        os.close(self._file)

    def _watch(self, before: dict[str, object], seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(min(0.5, seconds))
            # Opened anew: NFS shows another machine's writes then. The descriptor of the lock stays open.
            if self._read_again() not in (before, {}):
                self._refuse(before)

    def _read(self) -> dict[str, object]:
        try:
            return json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
