"""Named arrays in a file that all processes of a node share: mapped into memory, not read into each."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import numpy as np
from jaxtyping import Shaped
from numpy.lib import format as npy
from numpy.typing import NDArray

from recipe.records import PARTIAL, rename

log = logging.getLogger(__name__)

_LOCAL_HEADER = 30  # bytes, before the name and the extra field of a zip file's member


def write_mapped(path: Path, arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
    """Write named arrays as a whole, without a copy in memory; raise OSError if the folder cannot be written."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")  # two runs may write one cache
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def map_arrays(path: Path) -> dict[str, Shaped[np.ndarray, "..."]] | None:
    """Map the arrays of `write_mapped`, checked; None if the file is missing or damaged. A damaged one is removed."""
    if not path.is_file():
        return None
    try:
        with ZipFile(path) as members, path.open("rb") as file:
            damaged = members.testzip()
            if damaged is not None or any(member.compress_type != ZIP_STORED for member in members.infolist()):
                raise ValueError(f"{damaged or 'a compressed array'} is not what was written")
            return {
                member.filename.removesuffix(".npy"): _map(path, file, member.header_offset)
                for member in members.infolist()
            }
    except Exception as error:  # zipfile and numpy each have their own
        log.warning("%s is damaged (%r): computing it again", path, error)
        path.unlink(missing_ok=True)
        return None


def _map(path: Path, file: Any, start: int) -> NDArray[Any]:
    file.seek(start)
    header = file.read(_LOCAL_HEADER)
    file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), os.SEEK_CUR)
    npy.read_magic(file)
    shape, _, dtype = npy.read_array_header_1_0(file)
    if 0 in shape:  # nothing to map
        return np.empty(shape, dtype)
    mapped = np.memmap(path, dtype=dtype, mode="r", offset=file.seek(0, os.SEEK_CUR), shape=shape)
    return np.asarray(mapped)  # a plain array is several times as fast to index; it keeps the mapping
