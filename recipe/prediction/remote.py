"""Images in an object store, by addresses such as `s3://bucket/folder`, through Composer's clients."""

import errno
from collections import Counter
from functools import lru_cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from recipe.images import SUFFIXES
from recipe.redact import redact


def is_remote(argument: str) -> bool:
    """Return whether this is an address in a store."""
    return "://" in argument


class RemoteImage(PurePosixPath):
    """A file in a store, in place of a local path; as text it is its address."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)  # a path holds no empty part

    def absolute(self) -> "RemoteImage":
        """Return itself."""
        return self

    def resolve(self) -> "RemoteImage":
        """Return itself."""
        return self

    def read_bytes(self) -> bytes:
        """Fetch the file; raise OSError if the store does not give it."""
        store, _, key = _open(str(self))
        with TemporaryDirectory() as folder:
            path = Path(folder, "image")
            try:
                store.download_object(key, str(path))
                return path.read_bytes()
            except Exception as error:  # every store raises its own
                raise OSError(errno.EIO, redact(str(error)).splitlines()[0]) from error


def list_images(address: str) -> tuple[list[RemoteImage], Counter[str]]:
    """Return the images below an address, by name, or the one that it names, and counts of other files by suffix.

    Raises:
        ValueError: The store cannot be listed.
    """
    if address.lower().endswith(SUFFIXES):
        return [RemoteImage(address)], Counter()
    store, root, key = _open(address)
    folder = f"{key.rstrip('/')}/" if key.strip("/") else ""
    try:
        keys = sorted(store.list_objects(folder))
    except Exception as error:
        raise ValueError(f"cannot list {redact(address)}: {redact(str(error)).splitlines()[0]}") from error
    found, others = list[RemoteImage](), Counter[str]()
    for name in keys:
        parts = name[len(folder) :].split("/")
        if name.endswith("/") or any(part.startswith(".") for part in parts):
            continue
        if name.lower().endswith(SUFFIXES):
            found.append(RemoteImage(f"{root}/{name}"))
        else:
            others[PurePosixPath(name).suffix.lower()] += 1
    return found, others


def _open(address: str) -> tuple[Any, str, str]:
    """Return the client of a store, its address, and what is named in it; raise ValueError if there is no client."""
    from composer.utils import parse_uri  # takes seconds to import, which local files can do without

    backend, bucket, key = parse_uri(address)
    root = f"{backend}://{bucket}"
    return _client(root), root, key


@lru_cache
def _client(root: str) -> Any:
    from composer.utils import maybe_create_object_store_from_uri

    try:
        return maybe_create_object_store_from_uri(root)
    except Exception as error:  # an unknown scheme, or a client without its package or its keys
        raise ValueError(f"{redact(root)} cannot be opened: {redact(str(error)).splitlines()[0]}") from error
