"""A stream whose files are what the index says, or an error names them.

Streaming 0.13 (`Stream._prepare_shard_part`) reads a file that is already present without any check, so that a flipped
byte reaches training. Delete once it checks these files too; `test_upstream_reads_the_flipped_byte` then fails.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming import Stream
from streaming.base import format
from streaming.base.compression import decompress
from streaming.base.format import Reader
from streaming.base.hashing import get_hash, is_hash
from streaming.base.world import World

from recipe.records import INDEX_FILE, FileInfo, file_pairs, parse_index
from recipe.upstream.fetch import RemoteFolder, remove_dead_parts

log = logging.getLogger(__name__)

AnyFileInfo = format.FileInfo | FileInfo  # of a reader, or of an index
DOWNLOAD_RETRY = 4
DOWNLOAD_TIMEOUT = 60.0


class CheckedStream(Stream):
    """A Stream that checks each file once per run, whether fetched or present: its size and one checksum.

    The checksum is `validate_hash`, or the first one in the index. A wrong file is fetched again, as bounded by
    `RemoteFolder.fetch`.
    """

    # Until the data set sets its own defaults.
    download_retry = DOWNLOAD_RETRY
    download_timeout = DOWNLOAD_TIMEOUT
    checks_all_at_start = False
    key = ""  # below `streams` in the configuration

    def __init__(self, *, local: str, remote: str | None = None, **keywords: Any):
        if remote is not None and os.path.abspath(remote) == os.path.abspath(local):
            remote = None
        self.source = None if remote is None else RemoteFolder(remote)
        super().__init__(local=local, remote=remote, **keywords)

    @property
    def folder(self) -> Path:
        """Return the folder of the index and the shards."""
        return Path(self.local, self.split)

    def set_up_folder(self) -> None:
        """Fetch the index if it is missing, and check the sizes of present files.

        Raises:
            RuntimeError: The index cannot be fetched.
            ValueError: The index is bad; or, without a remote, a file is missing or has the wrong size.
        """
        pairs = [pair for shard in self.read_index()["shards"] for pair in file_pairs(shard)]
        if self.source is not None:
            remove_dead_parts({(self.folder / raw.basename).parent for raw, _ in pairs})
        for raw_info, zip_info in pairs:
            present = [info for info in (raw_info, zip_info) if info and (self.folder / info.basename).is_file()]
            if self.source is None and not present:
                raise self._missing(raw_info)
            for info in present:
                self._is_good(info, with_hash=False)
        if not all((zip_info or raw_info).hashes for raw_info, zip_info in pairs):
            log.warning(
                "%s holds no checksums: only the sizes of its files are checked. Convert the data set again, or with "
                "MDSWriter(hashes=['xxh64'])",
                self.folder / INDEX_FILE,
            )

    def read_index(self) -> dict[str, Any]:
        """Return the checked index, fetched if it is missing or bad.

        Raises:
            RuntimeError: It cannot be fetched.
            ValueError: It is bad, and there is no remote; or it does not hold the checksum `validate_hash`.
        """
        path = self.folder / INDEX_FILE
        if self.source is not None and path.is_file():
            try:
                parse_index(path)
            except ValueError as error:
                log.warning("%s %s: fetching it again", path, error)
                path.unlink()
        if self.source is not None and not path.is_file():
            self._fetch(INDEX_FILE, parse_index)
        try:
            index = parse_index(path)
        except ValueError as error:
            raise ValueError(f"{path} {error}: convert the data set again") from None
        for info in (info for shard in index["shards"] for pair in file_pairs(shard) for info in pair if info):
            if self.validate_hash and self.validate_hash not in info.hashes:
                raise ValueError(
                    f"validate_hash is {self.validate_hash!r}, but {path} holds {sorted(info.hashes)} of "
                    f"{info.basename}: set one of those, or null for the first"
                )
        return index

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Return Streaming's readers, of a checked index."""
        self.read_index()
        return super().get_shards(world, allow_unsafe_types)

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Report no shard as present, so that each is checked by `prepare_shard`.

        With a cache limit, present shards count towards it, so they are checked now.
        """
        super().set_up_local(shards, cache_usage_per_shard)
        cache_usage_per_shard[:] = 0
        for number, shard in enumerate(shards if self.checks_all_at_start else ()):
            if all(self._is_good(raw_info) for raw_info, _ in shard.file_pairs):
                infos = [info for pair in shard.file_pairs for info in pair if info]
                cache_usage_per_shard[number] = sum(
                    info.bytes for info in infos if (self.folder / info.basename).is_file()
                )
            else:
                shard.evict()

    def _prepare_shard_part(
        self, raw_info: AnyFileInfo, zip_info: AnyFileInfo | None = None, compression: str | None = None
    ) -> int:
        """Fetch and check a file; return its bytes on disk, including its compressed form if kept."""
        has_raw = self._is_good(raw_info)
        if zip_info is None:
            if not has_raw:
                self._fetch_shard(raw_info)
            return raw_info.bytes
        zip_path, raw_path = self.folder / zip_info.basename, self.folder / raw_info.basename
        if not has_raw:
            if not self._is_good(zip_info):
                self._fetch_shard(zip_info)
            part = raw_path.with_name(f".{raw_path.name}.{os.getpid()}.part")
            try:
                part.write_bytes(decompress(compression, zip_path.read_bytes()))
                self._check(part, raw_info)
                part.replace(raw_path)
            except Exception as error:
                if self.source is not None:
                    zip_path.unlink()
                raise RuntimeError(f"{zip_path} cannot be decompressed to {raw_info.basename}: {error}") from error
            finally:
                part.unlink(missing_ok=True)
        if not self.safe_keep_zip:
            zip_path.unlink(missing_ok=True)
        return raw_info.bytes + (zip_info.bytes if zip_path.is_file() else 0)

    def _is_good(self, info: AnyFileInfo, with_hash: bool = True) -> bool:
        """Return whether a file is present and right; remove a wrong one, or raise ValueError without a remote."""
        path = self.folder / info.basename
        if not path.is_file():
            return False
        try:
            self._check(path, info, with_hash)
        except ValueError as error:
            if self.source is None:
                raise ValueError(
                    f"{path} {error}, and the stream has no `remote`: convert the data set again"
                ) from None
            log.warning("%s %s: fetching it again", path, error)
            path.unlink()
            return False
        return True

    def _check(self, path: Path, info: AnyFileInfo, with_hash: bool = True) -> None:
        """Raise ValueError, in words that follow the file's name, if its content is not that of `info`."""
        size = path.stat().st_size
        if size != info.bytes:
            raise ValueError(f"has {size} bytes, its index says {info.bytes}")
        algorithm = self.validate_hash or next(filter(is_hash, info.hashes), None)
        if algorithm and with_hash:
            found = get_hash(algorithm, path.read_bytes())
            if found != info.hashes[algorithm]:
                raise ValueError(f"has the {algorithm} {found}, its index says {info.hashes[algorithm]}")

    def _missing(self, info: AnyFileInfo) -> ValueError:
        path = self.folder / info.basename
        return ValueError(f"{path} is missing, and the stream has no `remote`: restore the file")

    def _fetch_shard(self, info: AnyFileInfo) -> None:
        if self.source is None:
            raise self._missing(info)

        def check(part: Path) -> None:
            try:
                self._check(part, info)
            except ValueError as error:
                raise ValueError(f"{error} (if the data set was converted again, empty {self.folder})") from None

        self._fetch(info.basename, check)

    def fetch_next_to_index(self, name: str) -> Path | None:
        """Return the local path of another file of the folder, fetched if needed; None if it does not exist."""
        path = self.folder / name
        found = path.is_file() or (self.source is not None and self._fetch(name, lambda part: None, must_exist=False))
        return path if found else None

    def _fetch(self, name: str, check: Callable[[Path], object], must_exist: bool = True) -> bool:
        assert self.source is not None
        source, path = os.path.join(self.split, name), self.folder / name
        return self.source.fetch(source, path, check, self.download_retry, self.download_timeout, must_exist)
