"""Plans on this node's disk: one process makes the plan of an epoch, the other ranks and workers read it."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import gettempdir

from filelock import FileLock

from recipe.data.arrays import read_arrays, write_arrays
from recipe.data.plan import Plan

_SECONDS_KEPT = 24 * 3600


def cached_plan(key: str, make: Callable[[], Plan]) -> Plan:
    """The plan kept under `key`, made by the first process that asks.

    Where making it fails, it fails in every process: nobody waits for a plan that will never be.

    A plan that other code made is never read: it may be another one.

    Args:
        key: All data and settings that the plan depends on, as a file name.
        make: Makes it.
    """
    folder = Path(gettempdir(), f"recipe-plans-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user: remove it, or set TMPDIR to a folder of your own")
    path = folder / f"{key}-{_code_digest()}.npz"
    with FileLock(f"{path}.lock"):
        plan = read_arrays(path, Plan)
        if plan is None:
            _remove_old(folder)
            plan = make()
            write_arrays(path, plan)
        return plan


@cache
def _code_digest() -> str:
    """Of this package's source and of the libraries that shuffle and draw."""
    digest = sha256(f"numpy {version('numpy')}, streaming {version('mosaicml-streaming')}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _remove_old(folder: Path) -> None:
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # a process that makes the plan of another key may be quicker
            if time.time() - path.stat().st_mtime > _SECONDS_KEPT:
                path.unlink()
