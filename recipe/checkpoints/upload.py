"""Uploads of one rank to a store: in order, each manifest after its files, and again if the process is killed."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from composer.utils import RemoteUploader, parse_uri

from recipe.checkpoints.check import UNFINISHED, checkpoint_of, files_of, manifest_of, parse_manifest, prune
from recipe.checkpoints.places import StoreFolder
from recipe.redact import redact, redact_text

RESTARTS = 3  # of the process, per upload
PATIENCE = 120.0  # seconds that training waits for uploads, before it leaves a checkpoint out
LOOK = 5.0  # seconds between two looks for a file of another rank

log = logging.getLogger(__name__)


class Uploads:
    """In place of the processes of Composer's uploader, which never replaces a killed one and knows no order.

    One process uploads, and one thread waits for it. A checkpoint in the store is unfinished from its marker
    (`UNFINISHED`) to its manifest, which is uploaded when all files of all ranks are there in full. Composer's copy of
    a file, which waits on the disk to be uploaded, is removed if that fails too.

    Args:
        place: Where `trainer.save_folder` is.
        timeout: Seconds that a manifest waits for the files of other ranks.
    """

    def __init__(self, place: StoreFolder, timeout: float):
        self.place = place
        self._timeout = timeout
        self._prefix = f"{parse_uri(place.uri)[2].rstrip('/')}/".lstrip("/")
        self._thread = ThreadPoolExecutor(1, "uploads")
        self._process = upload_process()
        self._own: set[str] = set()
        self._unmarked: set[str] = set()  # checkpoints that no store would know as unfinished
        self._is_ending = False  # other ranks may be dead
        self._of_last: list[Future[Any]] = []  # uploads since `make_room`
        self._of_others: list[Future[Any]] = []  # and those of the checkpoint before

    def submit(self, work: Callable[..., int], **keywords: Any) -> "Future[int]":
        """Upload a file after those before it; `work` is Composer's, with `remote_file_name` and `local_file_path`."""
        self._of_last.append(self._thread.submit(self._upload, work, keywords))
        return self._of_last[-1]

    def make_room(self, is_last: bool = False) -> None:
        """Wait, before a checkpoint is written, for all uploads but those of the one before: each takes disk space.

        Raises:
            OSError: They have not ended after `PATIENCE`, and this is not the last checkpoint.
        """
        if not all(future.done() for future in self._of_others):
            log.warning("uploads to %s take longer than trainer.save_interval: training waits", redact(self.place.uri))
            if wait(self._of_others, None if is_last else PATIENCE).not_done:
                raise OSError(f"uploads of earlier checkpoints have not ended, {PATIENCE:g} s after this one was due")
        self._of_others, self._of_last = self._of_last, []

    def prune(self, keep: int, batch: int) -> "Future[None]":
        """After the uploads so far, remove the oldest checkpoints of the store down to `keep`; see `check.prune`."""
        return self._thread.submit(self._try, lambda: prune(self.place, keep, batch), "old checkpoints stay")

    def finish(self) -> None:
        """Upload what was submitted before an exception ends this process, but wait for no file of another rank.

        Python itself ends the process that uploads before the thread, so that what waits would be lost.
        """
        self._is_ending = True
        self._thread.shutdown()

    def shutdown(self, wait: bool = True) -> None:
        """Stop the process after what was submitted."""
        self._thread.shutdown(wait=wait)
        self._process.shutdown(wait=wait)

    def _upload(self, work: Callable[..., int], keywords: dict[str, Any]) -> int:
        name, path = keywords["remote_file_name"].removeprefix(self._prefix), Path(keywords["local_file_path"])
        try:
            return self._upload_next(work, keywords, name, path)
        finally:
            path.unlink(missing_ok=True)

    def _upload_next(self, work: Callable[..., int], keywords: dict[str, Any], name: str, path: Path) -> int:
        checkpoint = checkpoint_of(name)
        if checkpoint is not None:
            self._await_files(checkpoint, path)
        elif name.endswith(UNFINISHED):
            self._unmarked.add(name.removesuffix(UNFINISHED))
            for sharded in (False, True):  # of an older one: its files are about to be replaced
                manifest = manifest_of(name.removesuffix(UNFINISHED), sharded)
                self._try(lambda manifest=manifest: self.place.remove(manifest), f"an older {manifest} stays")
        elif name.startswith(tuple(self._unmarked)):
            self._own.add(name)  # its manifest need not wait for it
            raise OSError(f"{name} is not uploaded, because {UNFINISHED} of its checkpoint could not be")
        self._own.add(name)
        result = self._run(work, keywords, path)
        self._unmarked.discard(name.removesuffix(UNFINISHED))
        if checkpoint is not None:
            self._try(lambda: self.place.remove(f"{checkpoint}{UNFINISHED}"), "an empty file stays")
        return result

    def _run(self, work: Callable[..., int], keywords: dict[str, Any], path: Path) -> int:
        for attempt in range(1, RESTARTS + 2):
            try:
                return self._process.submit(work, **keywords).result()
            except BrokenProcessPool:
                text = "the process that uploads checkpoints was killed, perhaps because memory ran out"
                if attempt > RESTARTS:
                    raise OSError(f"{text}, {attempt} times in a row") from None
                log.error("%s: it is started again, %d of %d times", text, attempt, RESTARTS)
                self._process = upload_process()
            if not path.exists():  # Composer's last step: all was uploaded
                break
        return 0

    def _await_files(self, checkpoint: str, path: Path) -> None:
        until = time.monotonic() + self._timeout
        for name, entry in files_of(checkpoint, parse_manifest(path.read_bytes())).items():
            while (size := self.place.size(name)) != entry.size:
                if name in self._own or self._is_ending or time.monotonic() > until:
                    found = "is not there" if size is None else f"has {size} of {entry.size} bytes"
                    raise OSError(f"no manifest is written for {checkpoint}, because {name} {found}")
                time.sleep(LOOK)

    def _try(self, action: Callable[[], None], consequence: str) -> None:
        try:
            action()
        except (OSError, NotImplementedError) as error:
            log.warning("%s: %s in %s", error, consequence, redact(self.place.uri))


def upload_process() -> ProcessPoolExecutor:
    """Return a process that ignores SIGTERM: a job may receive it before its last checkpoint is uploaded.

    It ends with its parent: an upload that ends later could replace a file of the run that has resumed.
    """
    return ProcessPoolExecutor(1, get_context("spawn"), _set_up)


def _set_up() -> None:
    """Prepare a new process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def failed_uploads(uploader: RemoteUploader | None, wait: bool) -> list[str]:
    """Return why uploads of this rank failed, each once; with `wait`, of all that were started."""
    if uploader is None:
        return []
    ended = [future for future in uploader.futures if wait or future.done()]
    errors = [error for future in ended if (error := future.exception()) is not None]
    uploader.futures = [future for future in uploader.futures if future not in ended]
    return [redact_text(f"{type(error).__name__}: {error}") for error in errors]
