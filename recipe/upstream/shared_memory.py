"""What killed runs leave behind of Streaming's shared memory.

Streaming takes the first free number of the machine for each data set and never gives the lock files of a number
back. After a SIGKILL of a whole run its segments stay too. The next run then either counts on past them, or, where the
lock files are gone (another or an emptied temporary folder), refuses to start: "Reused local directory".
"""

import logging
import os
import re
import tempfile
import time
from pathlib import Path

from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN

log = logging.getLogger(__name__)

SEGMENTS = Path("/dev/shm")
PROCESSES = Path("/proc")
FAILURE_SEGMENT = "failure"  # our own beside Streaming's: why a shard could not be had
YOUNGEST = 30.0  # seconds: a segment exists an instant before its process maps it
_SEGMENT_NAME = re.compile(rf"(\d{{6}})_(?:{'|'.join([*SHM_TO_CLEAN, FAILURE_SEGMENT])})")
_LOCK_NAME = re.compile(rf"(\d{{6}})_(?:{BARRIER_FILELOCK}|{CACHE_FILELOCK})")


def clean_dead_shared_memory() -> list[str]:
    """Removes the segments and lock files of runs that have ended; call once a node, before the first data set.

    Left alone are: other users' files, files younger than `YOUNGEST` seconds, and every file of a number of which any
    process maps a segment. Processes of containers that share /dev/shm but not /proc are not seen: do not call it
    there. Does nothing on systems without /dev/shm or /proc.

    Returns:
        The paths of what was removed.
    """
    if not (SEGMENTS.is_dir() and (PROCESSES / "self" / "maps").is_file()):
        return []
    files = [*_matching(SEGMENTS, _SEGMENT_NAME), *_matching(Path(tempfile.gettempdir()), _LOCK_NAME)]
    # After the listing: what has been mapped since then is seen as alive.
    alive = _mapped_numbers()
    dead: list[Path] = []
    for path, number in files:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if status.st_uid != os.getuid():
            continue
        if time.time() - max(status.st_mtime, status.st_ctime) < YOUNGEST:
            alive.add(number)
        dead.append(path)
    removed = []
    for path in dead:
        if path.name[:6] not in alive:
            path.unlink(missing_ok=True)
            removed.append(str(path))
    if removed:
        log.info("removed %d files that ended runs left in shared memory", len(removed))
    return removed


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, str]]:
    """Files of a folder whose name fits, each with its data set's number."""
    found = [(Path(entry.path), pattern.fullmatch(entry.name)) for entry in os.scandir(folder)]
    return [(path, match[1]) for path, match in found if match]


def _mapped_numbers() -> set[str]:
    """The numbers of which a process of this machine maps a segment."""
    numbers = set()
    for maps in PROCESSES.glob("[0-9]*/maps"):
        try:
            lines = maps.read_text(errors="replace").splitlines()
        except OSError:  # another user's, or ended meanwhile
            continue
        for line in lines:
            if f"{SEGMENTS}/" in line:
                match = _SEGMENT_NAME.match(line.rpartition("/")[2])
                numbers |= {match[1]} if match else set()
    return numbers
