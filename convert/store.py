"""Where a data set goes: a folder, or an object store through Streaming; and the state of an unfinished conversion.

Every function opens a client of its own: processes that share one over a fork get each other's answers. All raise
OSError if a store fails. Streaming is imported when a store is used, because it imports torch.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urlparse

from filelock import FileLock

from convert.items import Rejected
from recipe.records import INDEX_FILE, PARTIAL, write_whole
from recipe.redact import redact

if TYPE_CHECKING:
    from streaming.base.storage import CloudUploader

REJECTED_FILE = "rejected.jsonl"
PART_FILE = "part.json"  # written last into the staging folder of a part
ATTEMPTS = 5  # waits 1, 2, 4 and 8 seconds between them
_THREADS = 4
_LOCK_SECONDS = 10  # longer than the workers of a killed conversion live on


def is_remote(address: str) -> bool:
    """Return whether it is an object-store address, not a local folder."""
    return urlparse(address).scheme != ""


def join(out: str, name: str) -> str:
    """Return the address of `name` under `out`, or `out` if the name is empty."""
    return os.path.join(out, name) if name else out


def local_folder(address: str) -> Path:
    """Return a local address as an absolute path; links are not followed."""
    return Path(os.path.abspath(os.path.expanduser(address)))


def list_names(address: str, prefix: str = "") -> frozenset[str] | None:
    """Return the names below `address` that begin with `prefix`, None if Streaming cannot list this kind of store."""
    with tempfile.TemporaryDirectory() as folder:
        uploader, above = _open(Path(folder), address), f"{urlparse(address).path.strip('/')}/"
        with _failing("list", address), suppress(NotImplementedError):
            return frozenset(key.lstrip("/").removeprefix(above) for key in uploader.list_objects(prefix) or ())
    return None


def exists(address: str, name: str) -> bool:
    """Return whether there is an object `name` under `address`; it is fetched if Streaming cannot list."""
    names = list_names(address, name)
    if names is not None:
        return name in names
    with tempfile.TemporaryDirectory() as folder:
        try:
            download(join(address, name), Path(folder, name))
        except OSError as error:
            if is_missing(error.__cause__):
                return False
            raise
    return True


def is_missing(error: BaseException | None) -> bool:
    """Return whether a client says that there is no such object; each has its own error for it."""
    response = getattr(error, "response", None)  # of botocore; 403, as without the right to list, is not taken for it
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    status = getattr(error, "status_code", None) or getattr(error, "code", None)  # of Azure's and of Google's
    return isinstance(error, FileNotFoundError) or code in ("404", "NoSuchKey") or status == 404


def upload(folder: Path, names: Sequence[str], address: str) -> None:
    """Move files of a local folder to the object store, all before it returns; each is tried `ATTEMPTS` times."""
    if not names:
        return
    # An uploader wants an empty folder, and removes what it has sent. Next to `folder`: a kill may leave it behind.
    with tempfile.TemporaryDirectory(dir=folder.parent) as outbox, ThreadPoolExecutor(_THREADS) as executor:
        uploader = _open(Path(outbox), address)
        for name in names:
            (folder / name).rename(Path(outbox, name))
        jobs = [(name, executor.submit(uploader.upload_file, name)) for name in names]
        try:
            for name, job in jobs:
                with _failing("upload", join(address, name)):
                    job.result()
        finally:
            executor.shutdown(cancel_futures=True)


def download(address: str, path: Path) -> None:
    """Fetch one object."""
    from streaming.base.storage import CloudDownloader

    with _failing("download", address):
        CloudDownloader.direct_download(address, str(path))


def read(address: str, name: str) -> bytes:
    """Return the bytes of a file of a data set."""
    if not is_remote(address):
        return (local_folder(address) / name).read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        download(join(address, name), Path(folder, name))
        return Path(folder, name).read_bytes()


def check_target(address: str, overwrite: bool) -> None:
    """Raise ValueError if anything is there but a local data set that the user wants to replace."""
    if is_remote(address):
        if exists(address, INDEX_FILE):
            raise ValueError(
                f"{redact(address)} holds a data set: choose another --out or --split, or empty it "
                "(--overwrite is local)"
            )
        return
    target = local_folder(address)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"{target} is a link or a file: name a folder")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{target} is not empty: choose another --out or --split, or replace it with --overwrite")
    if not (target / INDEX_FILE).is_file():
        raise ValueError(f"{target} holds no index.json, so it is not a data set that --overwrite may replace")


def staging_folder(address: str, staging: str | None = None) -> Path:
    """Return where the state of a conversion to `address` is kept: the same for the same address.

    Raises:
        ValueError: `staging`, for conversions to object stores, is given for a local address.
    """
    if is_remote(address):
        parent = Path(staging or Path(tempfile.gettempdir(), f"convert-{os.getuid()}")).expanduser().absolute()
        return parent / _key(address)
    if staging is not None:
        raise ValueError(f"--staging is for object stores: {address} is staged in a hidden folder next to it")
    target = local_folder(address)
    return target.parent / f".{target.name}.parts"


@contextmanager
def locked(folder: Path, address: str, keep: bool) -> Iterator[None]:
    """Make the staging folder for this process alone; remove it after the block, unless it failed and `keep` is set.

    Raises:
        ValueError: Another conversion uses the folder, or it belongs to another user.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ValueError(f"{folder} belongs to another user: choose another --staging")
    with _locked_file(folder, address):
        try:
            yield
        except BaseException:
            if not keep or not any(folder.glob(f"*/{PART_FILE}")):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder)


def _locked_file(folder: Path, address: str) -> IO[bytes]:
    """Return the folder's lock file, locked until this process and all that it forks have closed it or ended.

    So workers that outlive their killed parent keep the next conversion waiting. `filelock` (4.2.11) does not: it
    closes the file in forked processes, and such a worker would remove what the next conversion has written.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # a conversion that ended meanwhile removed it
        file = (folder / "lock").open("ab")
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), (folder / "lock").stat()):
                return file
        file.close()
        if time.monotonic() > deadline:
            raise ValueError(f"another conversion is writing {redact(address)}: wait for it, or stop it")
        time.sleep(0.1)


def die_with_parent() -> None:
    """End a forked process whose parent was killed: it would wait indefinitely and hold the conversion's lock."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def save_rejected(out: str, split: str, rejected: Sequence[Rejected]) -> None:
    """Replace the lines of `split` in OUT/rejected.jsonl and keep those of the other splits."""
    lines = [json.dumps({"split": split, **asdict(item)}) for item in rejected]
    key = _key(out if is_remote(out) else str(local_folder(out)))
    # The splits of one OUT may be converted at the same time.
    with FileLock(Path(tempfile.gettempdir(), f"convert-{os.getuid()}-{key}.lock")):
        if not is_remote(out):
            local_folder(out).mkdir(parents=True, exist_ok=True)
            _replace_lines(local_folder(out) / REJECTED_FILE, split, lines)
            return
        with tempfile.TemporaryDirectory() as outer:
            path = Path(outer, "out", REJECTED_FILE)
            path.parent.mkdir()
            if exists(out, REJECTED_FILE):
                download(join(out, REJECTED_FILE), path)
            _replace_lines(path, split, lines)
            upload(path.parent, [REJECTED_FILE], out)


def _replace_lines(path: Path, split: str, lines: Sequence[str]) -> None:
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        kept = [line for line in old if json.loads(line)["split"] != split]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a list of rejected records ({error!r}): move it away and run again") from error
    for partial in path.parent.glob(f"{path.name}.*{PARTIAL}"):  # of killed runs: this one has the lock
        partial.unlink()
    write_whole(path, "".join(f"{line}\n" for line in [*kept, *lines]).encode())


def _key(address: str) -> str:
    """Return a file name for an address."""
    return hashlib.sha256(address.encode()).hexdigest()[:16]


def _open(folder: Path, address: str) -> "CloudUploader":
    from streaming.base.storage import CloudUploader

    with _failing("reach", address):
        return CloudUploader.get((str(folder), _as_written(address)), retry=ATTEMPTS)


def _as_written(address: str) -> str:
    """Return an address as Streaming's writers take it.

    Of azure://ACCOUNT.blob.core.windows.net/CONTAINER/FOLDER, the form that its readers take, Streaming 0.13's writer
    wants azure://CONTAINER/FOLDER, and the account from the environment. Delete once both take one form.
    """
    url = urlparse(address)
    if url.scheme != "azure":
        return address
    if "." not in url.netloc or not url.path.strip("/"):
        raise ValueError("an Azure address is azure://ACCOUNT.blob.core.windows.net/CONTAINER/FOLDER")
    os.environ.setdefault("AZURE_ACCOUNT_NAME", url.netloc.split(".")[0])
    return f"azure:/{url.path}"


@contextmanager
def _failing(action: str, address: str) -> Iterator[None]:
    """Turn whatever a client raises into an OSError that says what failed, without secrets."""
    try:
        yield
    except Exception as error:
        raise OSError(f"cannot {action} {redact(address)}: {redact(f'{type(error).__name__}: {error}')}") from error
