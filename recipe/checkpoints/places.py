"""Where checkpoints are: a folder on disk or below an address of an object store, with the same few actions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from composer.utils import maybe_create_object_store_from_uri, parse_uri

from recipe.redact import redact, redact_text
from recipe.upstream.object_stores import delete_object


@dataclass(frozen=True)
class LocalFolder:
    """Checkpoints of a folder on disk."""

    path: Path

    def names(self) -> list[str]:
        """Return the paths of all files below; no links."""
        paths = [path for path in self.path.rglob("*") if path.is_file() and not path.is_symlink()]
        return [path.relative_to(self.path).as_posix() for path in paths]

    def size(self, name: str) -> int | None:
        """Return a file's bytes; None if there is no such file."""
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def fetch(self, names: Sequence[str], scratch: Path) -> Path:
        """Return the folder in which the names can be read."""
        return self.path

    def address(self, name: str) -> str:
        """Return the full path of a name."""
        return str(self.path / name)

    def remove(self, name: str) -> None:
        """Remove a file if it is there, and its folder if that is empty then."""
        path = self.path / name
        path.unlink(missing_ok=True)
        with suppress(OSError):
            if path.parent != self.path:
                path.parent.rmdir()

    def rename(self, name: str, new: str) -> None:
        """Give a file another name."""
        (self.path / name).replace(self.path / new)


@dataclass(frozen=True)
class StoreFolder:
    """Checkpoints of an object store, below an address such as `s3://bucket/run/checkpoints`.

    Every method opens a client of its own, and raises OSError if the store fails.
    """

    uri: str

    def names(self) -> list[str]:
        """Return the names of all objects below."""
        prefix = f"{parse_uri(self.uri)[2].rstrip('/')}/".lstrip("/")
        with self._open() as store:
            return [name.removeprefix(prefix) for name in store.list_objects(prefix)]

    def size(self, name: str) -> int | None:
        """Return an object's bytes; None if there is no such object."""
        with self._open() as store:
            try:
                return store.get_object_size(self._key(name))
            except FileNotFoundError:
                return None

    def fetch(self, names: Sequence[str], scratch: Path) -> Path:
        """Download the objects to the scratch folder and return it."""
        with self._open() as store:
            for name in names:
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                store.download_object(self._key(name), str(scratch / name), overwrite=True)
        return scratch

    def address(self, name: str) -> str:
        """Return the full address of a name."""
        return f"{self.uri.rstrip('/')}/{name}"

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        with self._open() as store, suppress(FileNotFoundError):
            delete_object(store, self._key(name))

    def rename(self, name: str, new: str) -> None:
        """Give an object another name, by a copy through this machine."""
        with TemporaryDirectory() as scratch, self._open() as store:
            store.download_object(self._key(name), f"{scratch}/object", overwrite=True)
            store.upload_object(self._key(new), f"{scratch}/object")
        self.remove(name)

    def _key(self, name: str) -> str:
        return parse_uri(self.address(name))[2]

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            yield maybe_create_object_store_from_uri(self.uri)
        except (OSError, NotImplementedError):
            raise
        except Exception as error:  # each client has its own
            text = redact_text(f"{type(error).__name__}: {error}")
            raise OSError(f"cannot use {redact(self.uri)}: {text}") from error


Place = LocalFolder | StoreFolder


def open_folder(folder: str) -> Place:
    """Return the folder of a path or address."""
    return StoreFolder(folder) if "://" in folder else LocalFolder(Path(folder))
