"""Images and annotation files in an object store, by addresses such as `s3://bucket/images`, through Streaming."""

import argparse
import os
import posixpath
import re
import tempfile
import time
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from convert import store
from convert.items import BadRecord
from recipe.redact import redact


class RemotePath(PurePosixPath):
    """A file or folder in a store, in place of a local path; as text it is its address."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)  # a path holds no empty part

    def is_dir(self) -> bool:
        """Return True: a store has no folders, and a wrong one shows when the first image is read."""
        return True

    def is_file(self) -> bool:
        """Return True: to ask costs a request per image, and a missing one is rejected when it is read."""
        return True


def input_path(text: str) -> Path:
    """Return a path or address of the command line; a type for `add_argument`."""
    return RemotePath(text) if store.is_remote(text) else Path(text)  # pyright: ignore[reportReturnType]


def fetch_files(args: argparse.Namespace, folder: Path) -> None:
    """Replace each file of a command line that is in a store by a copy of the same name, but not the images.

    Raises:
        OSError: The store does not give it.
    """
    for option, value in vars(args).items():
        if isinstance(value, RemotePath) and option != "images":
            path = folder / option / value.name
            path.parent.mkdir()
            store.download(str(value), path)
            setattr(args, option, path)


def root_of(images: Path | None) -> str:
    """Return the folder or address of the images as text, empty for None; raise ValueError if there is no such folder.

    Without one, `image_files.find_image` rejects each record that names an image.
    """
    if images is None:
        return ""
    if store.is_remote(str(images)):
        return str(images)
    if not images.is_dir():
        hint = ": an address is not taken here" if re.match(r"\w+:/", str(images)) else ""
        raise ValueError(f"image folder {images} does not exist{hint}")
    return os.path.abspath(images)


def address_of(root: str, name: str) -> str:
    """Return the address of the image `name` under `root`; raise `BadRecord` if it is not below it."""
    name = name.replace("\\", "/")
    if store.is_remote(name) or posixpath.isabs(name):
        raise BadRecord("absolute path", f"{name!r}: write it relative to --images")
    inner = posixpath.normpath(name)
    if inner.split("/")[0] in ("..", "."):
        raise BadRecord("path leaves the image root", repr(name))
    return f"{root.rstrip('/')}/{inner}"


def read_bytes(address: str) -> bytes:
    """Return an object's bytes; it is tried as often as an upload.

    Raises:
        BadRecord: There is no such object.
        OSError: The store does not give it, which says nothing of the record.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image")
        for attempt in range(store.ATTEMPTS):
            try:
                _client(os.getpid(), address.split("://")[0]).download(address, str(path))
                return path.read_bytes()
            except Exception as error:  # every store raises its own
                if store.is_missing(error):
                    raise BadRecord("missing file", redact(address)) from error
                _client.cache_clear()
                if attempt == store.ATTEMPTS - 1:
                    reason = redact(f"{type(error).__name__}: {error}")
                    raise OSError(f"cannot download {redact(address)}: {reason}") from error
                time.sleep(2**attempt)
    raise AssertionError


@lru_cache
def _client(process: int, scheme: str) -> Any:
    """Return the client of this process, since forked ones that share it get each other's answers."""
    from streaming.base.storage import CloudDownloader

    return CloudDownloader.get(f"{scheme}://")
