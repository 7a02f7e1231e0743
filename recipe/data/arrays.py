"""Dataclasses of numpy arrays, kept in a file that is whole or not there."""

import logging
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

log = logging.getLogger(__name__)

Arrays = TypeVar("Arrays")


def read_arrays(path: Path, kind: type[Arrays]) -> Arrays | None:
    """The dataclass kept in a file; None where there is no file, or a damaged one, which is removed."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as arrays:
            return kind(**{entry.name: arrays[entry.name] for entry in fields(kind)})  # pyright: ignore[reportArgumentType]
    except Exception as error:  # zipfile, zlib and numpy each have their own
        log.warning("%s is damaged (%r): it is made anew", path, error)
        path.unlink(missing_ok=True)
        return None


def write_arrays(path: Path, value: Any) -> None:
    """Keeps a dataclass of arrays.

    Raises:
        OSError: It cannot be written.
    """
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with part.open("wb") as file:
            np.savez(file, **vars(value))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
