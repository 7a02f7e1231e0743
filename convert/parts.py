"""Parts of a conversion: a fixed number of records, read, checked and written by one process; merged at the end.

The staging folder of a part holds its index, its records and, written last, its summary: everything else is then safe
on the disk or in the object store, so a killed conversion continues after its finished parts. Importing this module
imports Streaming, and with it torch.
"""

import hashlib
import json
import multiprocessing
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from streaming import MDSWriter
from tqdm import tqdm

from convert import store
from convert.items import Entry, Rejected, Summary
from recipe.records import INDEX_FILE, RECORDS_FILE, join_parts, parse_index, sync, to_record, write_part, write_whole
from recipe.schema import MDS_COLUMNS, Sample

_VERSION = 3  # increase it when the same record gives other bytes
_REFRESH = 0.2  # seconds between two looks at the counter of records
_make: Callable[[int], Any]  # of a worker process: set once, when it starts
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """What every part of a conversion shares.

    Attributes:
        staging: Folder of the parts' state; `data` in it becomes the data set, or holds what is uploaded last.
        address: Object store that finished shards go to; None: they wait in `data`.
        stored: Names in that store at the start, None if it cannot list them.
        hashes: Checksums kept in the index, sorted.
        size_limit: Bytes per shard, as `MDSWriter` takes it.
        strict: A part ends at its first rejected record.
        restartable: Finished parts of an earlier run are kept.
    """

    entries: Sequence[Entry]
    staging: Path
    address: str | None
    stored: frozenset[str] | None
    part_records: int
    hashes: tuple[str, ...]
    size_limit: int | str
    strict: bool
    restartable: bool

    @property
    def data(self) -> Path:
        """See `staging`."""
        return self.staging / "data"

    @cached_property
    def folders(self) -> list[Path]:
        """The staging folder of each part, at least one; its name is also that of its shards' folder."""
        num_parts = max(1, -(-len(self.entries) // self.part_records))
        return [self.staging / self.folder_name(number) for number in range(num_parts)]

    @staticmethod
    def folder_name(number: int) -> str:
        """Return the name of a part's folders."""
        return f"{number:05d}"

    def entries_of(self, number: int) -> Sequence[Entry]:
        """Return the records of a part."""
        return self.entries[number * self.part_records : (number + 1) * self.part_records]


def iter_parts(job: Job, num_workers: int) -> Generator[Summary, None, None]:
    """Make all parts and yield their summaries in order; as `map_forked`.

    Raises:
        ValueError: An entry cannot be read at all.
        OSError: The disk or the object store failed, or a worker died.
    """
    hidden = None if job.restartable else True  # None: hidden unless on a terminal
    return map_forked(partial(make_part, job), len(job.folders), len(job.entries), num_workers, hidden)


def map_forked(
    work: Callable[..., Result],
    num_calls: int,
    num_records: int,
    num_workers: int,
    hidden: bool | None = None,
) -> Generator[Result, None, None]:
    """Yield `work(number, advance)` of 0 to `num_calls` - 1 in order, from processes; 0 or 1 workers: this one alone.

    A progress bar counts records: `advance` is called with the number that is done; for `hidden` see tqdm's `disable`.

    Raises:
        OSError: A worker died.
    """
    numbers = range(num_calls)
    bar = partial(tqdm, total=num_records, unit=" records", file=sys.stderr, disable=hidden)
    if min(num_workers, len(numbers)) <= 1:
        with bar() as progress:
            yield from (work(number, progress.update) for number in numbers)
        return
    # By fork, workers inherit the records, whatever they hold: nothing is pickled or parsed twice.
    context = multiprocessing.get_context("fork")
    done = context.Value("q", 0)

    def advance(num_records: int) -> None:
        with done.get_lock():
            done.value += num_records

    executor = ProcessPoolExecutor(
        min(num_workers, len(numbers)), context, _start_worker, (partial(work, advance=advance),)
    )
    try:
        futures = [executor.submit(_call_make, number) for number in numbers]
        with bar() as progress:  # after the fork, because it may start a thread
            for future in futures:
                while not wait([future], timeout=_REFRESH).done:
                    progress.update(done.value - progress.n)
                progress.update(done.value - progress.n)
                yield future.result()
    except BrokenProcessPool as error:
        raise OSError(
            "a worker process was killed, perhaps because memory ran out: run the same command again, with fewer "
            "--num-workers"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def make_part(job: Job, number: int, advance: Callable[[int], object]) -> Summary:
    """Read and write part `number`, unless an earlier run did; `advance` is called with the number of records done."""
    entries = job.entries_of(number)
    fingerprint = find_fingerprint(job, entries) if job.restartable else ""
    state = load_state(job, job.folders[number]) if job.restartable else None
    if state is not None and state["fingerprint"] == fingerprint:
        advance(len(entries))
        return summary_of(state, kept=True)
    return write_entries(job, job.folders[number], entries, fingerprint, advance)


def write_entries(
    job: Job, folder: Path, entries: Iterable[Entry], fingerprint: str, advance: Callable[[int], object]
) -> Summary:
    """Read entries and write them as one part, with its state in `folder`, which is replaced; see `make_part`."""
    shutil.rmtree(folder, ignore_errors=True)
    summary, records = Summary(), []
    writer = _ShardWriter(
        columns=dict(MDS_COLUMNS), out=str(folder), hashes=list(job.hashes), size_limit=job.size_limit
    )
    try:
        for item in (item for entry in entries for item in _read(entry, advance)):
            summary.add(item)
            if isinstance(item, Sample):
                writer.write(item.to_mds())
                records.append(to_record(item))
            elif isinstance(item, Rejected) and job.strict:
                break
    except BaseException:
        writer.cancel_future_jobs()  # `finish`, and so `with`, would write an index that looks whole
        raise
    writer.finish()
    summary.shards = len(writer.shards)
    summary.num_bytes = sum(shard["raw_data"]["bytes"] for shard in writer.shards)
    write_part(folder / RECORDS_FILE, records)
    _save_part(job, folder, [shard["raw_data"]["basename"] for shard in writer.shards])
    state = {"fingerprint": fingerprint, "summary": summary.to_json()}
    write_whole(folder / store.PART_FILE, json.dumps(state).encode())
    return summary


def merge_parts(job: Job) -> None:
    """Write the index and the records of the whole data set; remove what an earlier run left in `job.data`.

    The index is the one that Streaming's `merge_index` writes. That function names shards that do not exist if there
    is a # or ? in the folder's path, fails if a killed run left an index, does not flush it to the disk, and warns on
    every call.
    """
    names = {folder.name for folder in job.folders}
    for path in (path for path in job.data.iterdir() if path.name not in names):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    index = {"version": 2, "shards": [shard for folder in job.folders for shard in _read_shards(folder)]}
    join_parts(job.data / RECORDS_FILE, [folder / RECORDS_FILE for folder in job.folders], index)
    sync(job.data / RECORDS_FILE)
    write_whole(job.data / INDEX_FILE, json.dumps(index, sort_keys=True).encode())


class _ShardWriter(MDSWriter):
    """`MDSWriter` without its empty shard if the first sample alone is over `size_limit`, and without its sleep."""

    def flush_shard(self) -> None:
        if self.new_samples:
            super().flush_shard()
            # Nothing is uploaded here, but `finish` sleeps for a second if the queue of uploads is not empty yet.
            self.executor.submit(int).result()


def _read(entry: Entry, advance: Callable[[int], object]) -> Iterator[Any]:
    yield from entry.read()
    advance(1)


def find_fingerprint(job: Job, entries: Iterable[Entry]) -> str:
    """Return what the bytes of a part depend on."""
    digest = hashlib.sha256(repr((_VERSION, dict(MDS_COLUMNS), job.hashes, job.size_limit, job.strict)).encode())
    for entry in entries:
        digest.update(entry.fingerprint().encode(errors="surrogatepass") + b"\n")
    return digest.hexdigest()


def _read_shards(folder: Path) -> list[dict[str, Any]]:
    """Return the shards in the index of a part, their names relative to the data set."""
    shards = parse_index(folder / INDEX_FILE)["shards"]
    for shard in shards:
        shard["raw_data"]["basename"] = f"{folder.name}/{shard['raw_data']['basename']}"
    return shards


def _save_part(job: Job, folder: Path, names: Sequence[str]) -> None:
    """Move the shards to `job.data` or the object store, and wait until all files are on the disk."""
    for path in folder.iterdir():
        sync(path)
    target = job.data / folder.name
    shutil.rmtree(target, ignore_errors=True)
    if job.address is not None:
        store.upload(folder, names, store.join(job.address, folder.name))
    elif names:
        target.mkdir()
        for name in names:
            (folder / name).replace(target / name)
        sync(target)
        sync(job.data)


def load_state(job: Job, folder: Path) -> dict[str, Any] | None:
    """Return the `PART_FILE` of a part that an earlier run made, None if the part is not whole."""
    try:
        state = json.loads((folder / store.PART_FILE).read_bytes())
        files = [shard["raw_data"] for shard in _read_shards(folder)]
    except (OSError, ValueError):
        return None
    if job.address is not None:
        whole = job.stored is None or all(file["basename"] in job.stored for file in files)
    else:
        paths = [(job.data / file["basename"], file["bytes"]) for file in files]
        whole = all(path.is_file() and path.stat().st_size == size for path, size in paths)
    return state if whole and (folder / RECORDS_FILE).is_file() else None


def summary_of(state: dict[str, Any], kept: bool) -> Summary:
    """Return the summary in a part's `PART_FILE`; `kept`: an earlier run made it."""
    summary = Summary.from_json(state["summary"])
    summary.kept = int(kept)
    return summary


def _start_worker(make: Callable[[int], Any]) -> None:
    global _make
    _make = make
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the parent decides
    Thread(target=store.die_with_parent, daemon=True).start()


def _call_make(number: int) -> Any:
    return _make(number)
