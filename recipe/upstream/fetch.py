"""One file from an object store: bounded in time and attempts, and checked before it gets its name.

Streaming 0.13 (`Stream._download_file`, `CloudDownloader`): `download_timeout` bounds a client's reads, not a download;
a fetched file is not checked for its size; a client shared over a fork mixes up the answers of its processes. Delete
once Streaming bounds and checks its downloads and opens one client per process.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse
from uuid import uuid4

from streaming.base.storage import CloudDownloader
from streaming.base.storage.download import DOWNLOADER_MAPPINGS

from recipe.redact import redact

log = logging.getLogger(__name__)

FIRST_BACKOFF = 1.0  # seconds before the second attempt; each further wait is twice as long
LONGEST_BACKOFF = 30.0
LONGEST_END = 5.0  # seconds that the end of a fetch's thread is waited for
AGE_OF_DEAD_PARTS = 3600.0  # seconds since a partial file was last written
_MISSING_CODES = {"404", "NoSuchKey", "403"}  # S3 returns 403 for a missing object without permission to list


class RemoteFolder:
    """A folder of an object store such as `s3://bucket/folder`, or a local one; each process opens its own client."""

    def __init__(self, address: str):
        scheme = urlparse(address).scheme
        if scheme not in DOWNLOADER_MAPPINGS:
            known = ", ".join(f"{name}://" for name in sorted(DOWNLOADER_MAPPINGS) if name)
            raise ValueError(f"{redact(address)}: no store is called {scheme}://; Streaming knows {known} and folders")
        self.address = address
        self._client: CloudDownloader | None = None
        self._owner = 0

    def fetch(
        self,
        name: str,
        path: Path,
        check: Callable[[Path], object],
        attempts: int,
        timeout: float,
        must_exist: bool = True,
    ) -> bool:
        """Fetch `name` to `path`, which appears whole and checked or not at all.

        Takes at most `attempts * timeout` seconds and the waits, 1 + 2 + 4 + ... up to 30 each: 247 s for 4 of 60 s.

        Args:
            name: Relative to the address.
            path: Where to; its folder is made.
            check: Raises ValueError, in words that follow the file's name, if the content is wrong.
            attempts: At least one is made.
            timeout: Wall-clock seconds per attempt.
            must_exist: Retry if the store has no such file, instead of returning False.

        Raises:
            RuntimeError: No attempt succeeded; names the file and every reason.
        """
        source = os.path.join(self.address, name)
        reasons: list[str] = []
        for attempt in range(max(1, attempts)):
            if attempt:
                time.sleep(min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** (attempt - 1)))
            part = path.with_name(f".{path.name}.{uuid4().hex}.part")
            try:
                self._download(source, part, timeout)
                check(part)
                part.replace(path)
                return True
            except Exception as error:  # reported after the last attempt
                if _is_missing(error) and not must_exist:
                    return False
                self._client = None
                kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
                reasons.append(redact(f"{kind}{error}"))
                log.warning("%s, attempt %d of %d: %s", redact(source), attempt + 1, max(1, attempts), reasons[-1])
            finally:
                part.unlink(missing_ok=True)
        tried = f"{len(reasons)} attempts" if len(reasons) > 1 else "1 attempt"
        raise RuntimeError(f"cannot fetch {redact(source)} in {tried}: {'; '.join(dict.fromkeys(reasons))}")

    def _download(self, source: str, part: Path, timeout: float) -> None:
        """Try once. A client that hangs cannot be stopped: its thread is abandoned and the next attempt has its own."""
        client = self._client if self._owner == os.getpid() else None
        if client is None:
            client = CloudDownloader.get(self.address)
            self._client, self._owner = client, os.getpid()
        errors: list[BaseException] = []
        abandoned = threading.Event()

        def work() -> None:
            try:
                client.download(source, str(part), timeout)
            except BaseException as error:  # raised below, unless abandoned
                errors.append(error)
            if abandoned.is_set():
                part.unlink(missing_ok=True)

        thread = threading.Thread(target=work, name=f"fetch {part.name}", daemon=True)
        thread.start()
        thread.join(timeout)
        if thread.is_alive():
            abandoned.set()
            raise TimeoutError(f"not complete after {timeout:g} s (download_timeout)")
        _wait_for_end(thread)
        if errors:
            raise errors[0]


def _wait_for_end(thread: threading.Thread) -> None:
    """Wait until the system has ended a thread that Python calls ended, on Linux, for at most `LONGEST_END` seconds.

    Of processes forked at once after a fetch one in about 350 hung at its first SSL context (Python 3.11.7, OpenSSL
    3.0): presumably the ending thread held a lock of OpenSSL's, which frees a thread's state in between.
    """
    end = time.monotonic() + LONGEST_END
    while os.path.exists(f"/proc/self/task/{thread.native_id}") and time.monotonic() < end:
        time.sleep(1e-4)


def remove_dead_parts(folders: set[Path]) -> None:
    """Remove the partial files that killed runs left in the folders."""
    for folder in folders:
        for part in folder.glob(".*.part*"):
            if time.time() - part.stat().st_mtime > AGE_OF_DEAD_PARTS:
                part.unlink(missing_ok=True)


def _is_missing(error: Exception) -> bool:
    """Return whether a store's error means that the file does not exist; each client has its own."""
    if isinstance(error, FileNotFoundError):
        return True
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return str(response.get("Error", {}).get("Code")) in _MISSING_CODES
    holders = (error, response)
    return any(getattr(holder, name, None) == 404 for holder in holders for name in ("code", "status", "status_code"))
