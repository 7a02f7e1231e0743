"""Removal of the shared memory that killed runs leave behind.

Streaming 0.13 (`streaming/base/shared/prefix.py`) takes the machine's first free number for each data set and never
removes its lock files. After a SIGKILL the segments stay too. The next run skips these numbers or, if the temporary
folder with the lock files has changed, stops with "Reused local directory". Delete once Streaming releases both.

Semaphores of Python's multiprocessing stay too if the process that would remove them is killed with its parent, as a
scheduler does; each started process of an uploader has five.
"""

import logging
import os
import re
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN

log = logging.getLogger(__name__)

SEGMENTS = Path("/dev/shm")
PROCESSES = Path("/proc")
FAILURE_SEGMENT = "failure"  # the recipe's own: why a shard could not be read
YOUNGEST = 30.0  # seconds: a segment exists for a moment before its process maps it
_SEGMENT_NAME = re.compile(rf"(\d{{6}})_(?:{'|'.join([*SHM_TO_CLEAN, FAILURE_SEGMENT])})|(sem\.mp-\w{{8}})")
_LOCK_NAME = re.compile(rf"(\d{{6}})_(?:{BARRIER_FILELOCK}|{CACHE_FILELOCK})")


def clean_dead_shared_memory() -> list[str]:
    """Remove what ended runs left and return its paths: segments, semaphores, lock files.

    Call it once per node, before any data set.

    Keeps other users' files, those of the last `YOUNGEST` seconds, and all files of a number that a process has mapped.
    Do not call it in containers that share /dev/shm but not /proc. Does nothing on systems without these.
    """
    if not (SEGMENTS.is_dir() and (PROCESSES / "self" / "maps").is_file()):
        return []
    files = [*_matching(SEGMENTS, _SEGMENT_NAME), *_matching(Path(tempfile.gettempdir()), _LOCK_NAME)]
    if not files:
        return []
    # Numbers of which any process maps a segment, and all that is mapped; listed later, so that those mapped meanwhile
    # count. glibc maps a new semaphore under a temporary name, so only its inode shows that a process has it.
    alive, mapped = set[str](), set[int]()
    for maps in PROCESSES.glob("[0-9]*/maps"):
        with suppress(OSError):  # another user's process, or ended meanwhile
            lines = maps.read_text(errors="replace").splitlines()
            lines = [line for line in lines if f"{SEGMENTS}/" in line]
            names = [line.rpartition("/")[2] for line in lines]
            alive |= {match[match.lastindex or 0] for match in map(_SEGMENT_NAME.match, names) if match}
            mapped |= {int(line.split(maxsplit=5)[4]) for line in lines}
    dead: list[tuple[Path, str]] = []
    for path, number in files:
        with suppress(FileNotFoundError):
            status = path.stat()
            if status.st_uid == os.getuid():
                dead.append((path, number))
                is_young = time.time() - max(status.st_mtime, status.st_ctime) < YOUNGEST
                if is_young or (path.parent == SEGMENTS and status.st_ino in mapped):
                    alive.add(number)
    removed = []
    for path, number in dead:
        if number not in alive:
            path.unlink(missing_ok=True)
            removed.append(str(path))
    if removed:
        log.info("removed %d files that ended runs left in shared memory", len(removed))
    return removed


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, str]]:
    """Return the files whose name fits, each with its data set's number, or its own name."""
    found = [(entry.path, pattern.fullmatch(entry.name)) for entry in os.scandir(folder)]
    return [(Path(path), match[match.lastindex or 0]) for path, match in found if match]
