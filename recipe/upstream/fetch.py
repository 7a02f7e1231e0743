"""One file from an object store: bounded in time and in attempts, and checked before it gets its name."""

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
AGE_OF_DEAD_PARTS = 3600.0  # seconds since a half-fetched file was last written to
_MISSING_CODES = {"404", "NoSuchKey", "403"}  # S3 says 403 of a missing object to those who may not list the bucket


class RemoteFolder:
    """A folder of an object store, or a local one; each process opens a client of its own.

    A client that is shared over a fork mixes up the answers of its processes, so its process is remembered.
    """

    def __init__(self, address: str):
        """Opens nothing yet.

        Args:
            address: Such as `s3://bucket/folder`, or a local folder.

        Raises:
            ValueError: Streaming knows no such store.
        """
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
        """Fetches `name` to `path`, which appears whole and checked or not at all.

        It takes at most `attempts * timeout` seconds and the waits between, 1 + 2 + 4 + ... up to 30 each: 247 s for
        4 attempts of 60 s.

        Args:
            name: Relative to the address.
            path: Where to; its folder is made.
            check: Raises ValueError, in a few words that do not name the file, where the content is wrong.
            attempts: How often to try.
            timeout: Seconds of one attempt, by the clock, however slowly bytes arrive.
            must_exist: Try a file again that the store says is missing; else that is the answer.

        Returns:
            False where the file is missing and need not exist.

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
            except Exception as error:  # every reason is reported when the attempts are used up
                if _is_missing(error) and not must_exist:
                    return False
                self._client = None
                reasons.append(_describe(error))
                log.warning("%s, attempt %d of %d: %s", redact(source), attempt + 1, max(1, attempts), reasons[-1])
            finally:
                part.unlink(missing_ok=True)
        tried = f"{len(reasons)} attempts" if len(reasons) > 1 else "1 attempt"
        raise RuntimeError(f"cannot fetch {redact(source)} in {tried}: {'; '.join(dict.fromkeys(reasons))}")

    def _download(self, source: str, part: Path, timeout: float) -> None:
        """One attempt. A client that hangs cannot be stopped: its thread is left behind, with a client of its own."""
        client = self._client if self._owner == os.getpid() else None
        if client is None:
            client = CloudDownloader.get(self.address)
            self._client, self._owner = client, os.getpid()
        errors: list[BaseException] = []
        abandoned = threading.Event()

        def work() -> None:
            try:
                client.download(source, str(part), timeout)
            except BaseException as error:  # raised below, unless nobody waits any more
                errors.append(error)
            if abandoned.is_set():
                part.unlink(missing_ok=True)

        thread = threading.Thread(target=work, name=f"fetch {part.name}", daemon=True)
        thread.start()
        thread.join(timeout)
        if thread.is_alive():
            abandoned.set()
            raise TimeoutError(f"not there after {timeout:g} s (download_timeout)")
        if errors:
            raise errors[0]


def remove_dead_parts(folders: set[Path]) -> None:
    """Removes what killed runs had fetched by half into the folders."""
    for folder in folders:
        for part in folder.glob(".*.part*"):
            if time.time() - part.stat().st_mtime > AGE_OF_DEAD_PARTS:
                part.unlink(missing_ok=True)


def _describe(error: Exception) -> str:
    """What happened, without a secret that a client's message may hold."""
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return redact(f"{kind}{error}")


def _is_missing(error: Exception) -> bool:
    """Whether a store's error says that there is no such file; each client says it in its own way."""
    if isinstance(error, FileNotFoundError):
        return True
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return str(response.get("Error", {}).get("Code")) in _MISSING_CODES
    holders = (error, response)
    return any(getattr(holder, name, None) == 404 for holder in holders for name in ("code", "status", "status_code"))
