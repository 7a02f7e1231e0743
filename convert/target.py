"""Where a data set goes: what may be there already, the staging folder beside it, and how it appears at last."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from convert import store
from convert.items import Rejected
from convert.parts import Job, sync, write_durably
from recipe.records import RECORDS_FILE, join_parts
from recipe.redact import redact

INDEX_FILE = "index.json"
REJECTED_FILE = "rejected.jsonl"
_LOCK_SECONDS = 10  # longer than the workers of a killed conversion live on


def local_folder(address: str) -> Path:
    """A local address as an absolute path; links are not followed."""
    return Path(os.path.abspath(os.path.expanduser(address)))


def staging_folder(address: str, staging: str | None = None) -> Path:
    """Where the state of a conversion to `address` is kept: the same for the same address.

    Args:
        address: Of the data set.
        staging: Folder chosen for the state of conversions to object stores.

    Raises:
        ValueError: `staging` is given for a local address.
    """
    if store.is_remote(address):
        parent = Path(staging or Path(tempfile.gettempdir(), f"convert-{os.getuid()}")).expanduser().absolute()
        return parent / _key(address)
    if staging is not None:
        raise ValueError(f"--staging is for object stores: {address} is staged in a hidden folder beside it")
    target = local_folder(address)
    return target.parent / f".{target.name}.parts"


@contextmanager
def locked(folder: Path, address: str, keep: bool) -> Iterator[None]:
    """Makes the staging folder for this process alone; removes it after the block.

    Args:
        folder: From `staging_folder`.
        address: Of the data set.
        keep: Leave finished parts where the block fails.

    Raises:
        ValueError: Another conversion is using the folder, or it belongs to somebody else.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ValueError(f"{folder} belongs to another user: choose another --staging")
    lock = FileLock(folder / "lock", timeout=_LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"another conversion is writing {redact(address)}: wait for it, or stop it") from error
    try:
        yield
        shutil.rmtree(folder)
    except BaseException:
        if not keep or not any(folder.glob("*.json")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        lock.release()


def check_split(split: str) -> None:
    """Refuses a split that is no plain folder name."""
    if split and (os.path.isabs(split) or set(split.split("/")) & {"", ".", "..", REJECTED_FILE}):
        raise ValueError(f"--split {split!r} is to be the plain name of a folder under --out, such as 'train'")


def check_target(address: str, overwrite: bool) -> None:
    """Refuses to write over anything but the local data set that the user said to replace.

    Raises:
        ValueError: Something else is there.
    """
    if store.is_remote(address):
        if store.exists(address, INDEX_FILE):
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


def publish(job: Job, address: str, shards: Sequence[dict[str, Any]]) -> None:
    """Makes the data set appear at `address`: its shards, the sidecar, and index.json last.

    Args:
        job: The conversion, all of whose parts are made.
        address: Of the data set.
        shards: The index's list.

    Raises:
        OSError: The disk or the object store failed.
    """
    index = {"version": 2, "shards": list(shards)}
    listed = {shard["raw_data"]["basename"] for shard in shards}
    for path in job.data.iterdir():  # such as shards of a part that has fewer of them by now
        if path.name not in listed:
            path.unlink()
    join_parts(job.data / RECORDS_FILE, map(job.records_file, range(job.num_parts)), index)
    sync(job.data / RECORDS_FILE)
    write_durably(job.data / INDEX_FILE, json.dumps(index, sort_keys=True))
    if job.address is not None:
        store.upload(job.data, [RECORDS_FILE], address)
        store.upload(job.data, [INDEX_FILE], address)
        return
    target = local_folder(address)
    if target.exists():
        replaced = job.staging / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    job.data.rename(target)
    sync(target.parent)


def save_rejected(out: str, split: str, rejected: Sequence[Rejected]) -> None:
    """Replaces the lines of `split` in OUT/rejected.jsonl, keeps those of the other splits."""
    lines = [json.dumps({"split": split, **asdict(item)}) for item in rejected]
    remote = store.is_remote(out)
    key = _key(out if remote else str(local_folder(out)))
    # The splits of one OUT may be converted at the same time.
    with FileLock(Path(tempfile.gettempdir(), f"convert-{os.getuid()}-{key}.lock")):
        if not remote:
            folder = local_folder(out)
            folder.mkdir(parents=True, exist_ok=True)
            _merge_lines(folder / REJECTED_FILE, split, lines)
            return
        with tempfile.TemporaryDirectory() as outer:
            path = Path(outer, "out", REJECTED_FILE)
            path.parent.mkdir()
            if store.exists(out, REJECTED_FILE):
                store.download(store.join(out, REJECTED_FILE), path)
            _merge_lines(path, split, lines)
            store.upload(path.parent, [REJECTED_FILE], out)


def _key(address: str) -> str:
    """A file name for an address."""
    return hashlib.sha256(address.encode()).hexdigest()[:16]


def _merge_lines(path: Path, split: str, lines: Sequence[str]) -> None:
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        kept = [line for line in old if json.loads(line)["split"] != split]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no list of rejected records ({error!r}): move it away, and run again") from error
    write_durably(path, "".join(f"{line}\n" for line in [*kept, *lines]))
