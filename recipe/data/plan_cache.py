"""Plans on this node's disk: one process makes the plan of an epoch, the other ranks and workers read it."""

import os
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from tempfile import gettempdir

import numpy as np
from filelock import FileLock

from recipe.data.plan import Plan

_SECONDS_KEPT = 24 * 3600


def cached_plan(key: str, make: Callable[[], Plan]) -> Plan:
    """The plan kept under `key`, made by the first process that asks.

    Where making it fails, it fails in every process: nobody waits for a plan that will never be.

    Args:
        key: All that the plan depends on, as a file name.
        make: Makes it.
    """
    folder = Path(gettempdir(), f"recipe-plans-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user: remove it, or set TMPDIR to a folder of your own")
    path = folder / f"{key}.npz"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            _remove_old(folder)
            part = path.with_suffix(f".{os.getpid()}.part")
            with part.open("wb") as file:
                np.savez(file, **vars(make()))
            part.replace(path)
        with np.load(path) as arrays:
            return Plan(**{entry.name: arrays[entry.name] for entry in fields(Plan)})


def _remove_old(folder: Path) -> None:
    for path in folder.iterdir():
        if time.time() - path.stat().st_mtime > _SECONDS_KEPT:
            path.unlink(missing_ok=True)
