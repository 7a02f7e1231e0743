"""Arrays with a number per sample: small, and in files that the processes of a node map instead of reading them."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any, overload
from zipfile import ZIP_STORED, ZipFile

import numpy as np
from composer.utils import dist
from filelock import FileLock
from jaxtyping import Int, Shaped
from numpy.lib import format as npy
from numpy.typing import NDArray

from recipe.records import PARTIAL, rename
from recipe.upstream.agreement import from_rank_0

log = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]

MOST_COUNT = 2**31 - 1  # tokens or patches of a sample
LEAST_SHARED = 1 << 24  # bytes; less is copied to each process
_LOCAL_HEADER = 30  # bytes, before the name and the extra field of a zip file's member
_HASHED_AT_ONCE = 1 << 20  # numbers
_SECONDS_KEPT = 24 * 3600


def small_ints(values: Int[np.ndarray, " n"], most: int) -> Int[np.ndarray, " n"]:
    """Return `values` as int32 if `most` fits, else as int64; not copied if they have that type."""
    return values.astype(np.int32 if most < 2**31 else np.int64, copy=False)


def hashed(arrays: Iterable[Shaped[np.ndarray, "..."]]) -> Any:
    """Return the SHA-256 of arrays, a `hashlib` object; integers count as 64 bits, which earlier versions had."""
    content = hashlib.sha256()
    for array in arrays:
        wide = np.dtype(np.int64) if np.issubdtype(array.dtype, np.signedinteger) else array.dtype
        for start in range(0, len(array), _HASHED_AT_ONCE):
            content.update(array[start : start + _HASHED_AT_ONCE].astype(wide, copy=False).tobytes())
    return content


def node_folder() -> Path:
    """Return the folder of this user for files that the processes of a node share; its files are kept for a day.

    Raises:
        PermissionError: It belongs to another user.
    """
    folder = Path(gettempdir(), f"recipe-plans-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user: remove it, or set TMPDIR to a folder of your own")
    return folder


def remove_old_files(folder: Path) -> None:
    """Remove what is older than a day; processes that have mapped a file keep it."""
    for old in folder.iterdir():
        with suppress(FileNotFoundError):  # another process may have removed it
            if time.time() - old.stat().st_mtime > _SECONDS_KEPT:
                old.unlink()


@overload
def shared_arrays(make: Callable[[], Arrays]) -> Arrays: ...
@overload
def shared_arrays(make: Callable[[], Arrays | None]) -> Arrays | None: ...


def shared_arrays(make: Callable[[], Arrays | None]) -> Arrays | None:
    """Return the named arrays that global rank 0 makes; all ranks must call it, and its error is raised on all.

    If they have `LEAST_SHARED` bytes or more, the processes of a node map one file; if the disk takes none, each has a
    copy.
    """
    made: list[Arrays | None] = []

    def offer() -> str | None:
        made.append(make())
        if made[0] is None or sum(array.nbytes for array in made[0].values()) < LEAST_SHARED:
            return None
        content = hashed(made[0].values())
        content.update(repr([(key, array.shape, array.dtype.str) for key, array in made[0].items()]).encode())
        name = f"arrays-{content.hexdigest()[:16]}.npz"
        return None if _on_this_node(name, made[0]) is None else name

    name = from_rank_0(offer)
    if name is None:
        return from_rank_0(lambda: made[0])
    kept = _on_this_node(name)
    if any(dist.all_gather_object(kept is None)):  # of another node
        sent = from_rank_0(lambda: made[0])
        if kept is None and sent is not None:
            kept = _on_this_node(name, sent) or sent
    return kept


def _on_this_node(name: str, arrays: Arrays | None = None) -> Arrays | None:
    """Map a file of this node, written first if it is missing and `arrays` are given; None if the disk has none.

    No error ends one rank alone: the others would wait for it.
    """
    try:
        folder = node_folder()
        with FileLock(folder / f"{name}.lock"):
            if arrays is not None and not (folder / name).is_file():
                remove_old_files(folder)
                write_mapped(folder / name, arrays)
            return map_arrays(folder / name)
    except (OSError, NotImplementedError) as error:  # the latter: a disk without locks
        log.warning("%s takes no file (%s): each process holds what they could share", gettempdir(), error)
        return None


def write_mapped(path: Path, arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
    """Write named arrays as a whole, without a copy in memory; raise OSError if the folder cannot be written."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")  # two runs may write one cache
    try:
        with partial.open("wb") as file:
            np.savez(file, **{name: np.ascontiguousarray(array) for name, array in arrays.items()})
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
