"""Object stores, through Streaming's uploaders and downloaders.

Every function opens a client of its own: one that is shared over a fork mixes up the answers of its processes.
"""

import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlparse

from streaming.base.storage import CloudDownloader, CloudUploader

from recipe.redact import redact

ATTEMPTS = 5  # waits 1, 2, 4 and 8 seconds between them
_THREADS = 4


def is_remote(address: str) -> bool:
    """Whether it is an object-store address, not a local folder."""
    return urlparse(address).scheme != ""


def join(out: str, name: str) -> str:
    """The address of `name` under `out`, or `out` where the name is empty."""
    return os.path.join(out, name) if name else out


def list_names(address: str, prefix: str) -> frozenset[str] | None:
    """Names of the objects right under `address` that begin with `prefix`; None where Streaming cannot list.

    Raises:
        OSError: The store cannot be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            keys = _open(Path(folder), address).list_objects(prefix)
        except NotImplementedError:
            return None
        except Exception as error:
            raise OSError(f"cannot list {redact(address)}: {_describe(error)}") from error
    return frozenset(name for key in keys or () if (name := os.path.basename(key)).startswith(prefix))


def exists(address: str, name: str) -> bool:
    """Whether there is an object `name` right under `address`; fetched to see, where Streaming cannot list.

    Raises:
        OSError: The store cannot say.
    """
    names = list_names(address, name)
    if names is not None:
        return name in names
    with tempfile.TemporaryDirectory() as folder:
        try:
            download(join(address, name), Path(folder, name))
        except OSError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise
    return True


def upload(folder: Path, names: Sequence[str], address: str) -> None:
    """Moves files of a local folder to the object store, all before it returns.

    Raises:
        OSError: One of them did not arrive, after several attempts.
    """
    if not names:
        return
    # An uploader wants an empty folder, and removes what it has sent. Beside `folder`: a kill may leave it behind.
    with tempfile.TemporaryDirectory(dir=folder.parent) as outbox, ThreadPoolExecutor(_THREADS) as executor:
        uploader = _open(Path(outbox), address)
        for name in names:
            (folder / name).rename(Path(outbox, name))
        jobs = [(name, executor.submit(uploader.upload_file, name)) for name in names]
        for name, job in jobs:
            try:
                job.result()
            except Exception as error:
                executor.shutdown(cancel_futures=True)
                raise OSError(f"cannot upload {redact(join(address, name))}: {_describe(error)}") from error


def download(address: str, path: Path) -> None:
    """Fetches one object.

    Raises:
        OSError: It did not arrive.
    """
    try:
        CloudDownloader.direct_download(address, str(path))
    except Exception as error:
        raise OSError(f"cannot download {redact(address)}: {_describe(error)}") from error


def _open(folder: Path, address: str) -> CloudUploader:
    try:
        return CloudUploader.get((str(folder), address), retry=ATTEMPTS)
    except Exception as error:
        raise OSError(f"cannot reach {redact(address)}: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    return redact(f"{type(error).__name__}: {error}")
