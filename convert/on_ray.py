"""Parts of a conversion as tasks of an existing Ray cluster, in place of processes of this machine.

A task gets its records, reads their images, uploads its shards and returns the rest: index, records and summary. These
go to the staging folder of the machine that runs the command. So everything else, merging and continuing included, is
that of a local conversion into a store, and the bytes are the same. Ray repeats the parts of a machine that is lost.
"""

import json
import logging
import socket
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from convert import store
from convert.items import Summary
from convert.parts import Job, find_fingerprint, load_state, summary_of, write_entries
from recipe.records import INDEX_FILE, RECORDS_FILE, write_whole

AHEAD = 4  # parts per core that wait in the cluster: each holds its records there
RETRIES = 3  # of a part whose worker or machine dies
_FILES = (INDEX_FILE, RECORDS_FILE, store.PART_FILE)  # the last one says that the others are there


def connect(address: str) -> Any:
    """Return Ray, connected to a cluster; `address` is as Ray's, such as `auto`, or `HOST:PORT` of its head.

    Raises:
        ValueError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs Ray: pip install '.[ray]', on every machine of the cluster") from None
    if not ray.is_initialized():
        try:
            host, _, port = address.rpartition("://")[2].rpartition(":")
            if port.isdigit():  # Ray itself waits for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"no Ray cluster at --address {address} ({reason}): start one with `ray start`") from error
    return ray


def iter_parts(job: Job, ray: Any) -> Generator[Summary, None, None]:
    """Make all parts and yield their summaries in order, as `parts.iter_parts`.

    Raises:
        ValueError: An entry cannot be read at all.
        OSError: The store failed, or a part's worker died too often.
    """
    from ray.exceptions import RayError, RayTaskError

    task = ray.remote(max_retries=RETRIES, num_cpus=1)(_make)
    spec = ray.put(replace(job, entries=(), stored=None))
    states = {number: load_state(job, folder) for number, folder in enumerate(job.folders) if folder.is_dir()}
    waiting, done, todo = dict[Any, int](), dict[int, Summary](), iter(range(len(job.folders)))
    with tqdm(total=len(job.entries), unit=" records", file=sys.stderr, disable=None) as progress:
        try:
            for wanted in range(len(job.folders)):
                while wanted not in done:
                    cores = int(ray.cluster_resources().get("CPU", 1))
                    machines = sum(node["Alive"] for node in ray.nodes())
                    progress.set_postfix_str(f"{cores} cores of {machines} machines", refresh=False)
                    while len(waiting) < AHEAD * max(1, cores) and (number := next(todo, None)) is not None:
                        state = states.get(number)
                        known = None if state is None else state["fingerprint"]
                        waiting[task.remote(spec, number, job.entries_of(number), known)] = number
                    (ready,), _ = ray.wait(list(waiting), num_returns=1)
                    number = waiting.pop(ready)
                    done[number] = _take(job.folders[number], ray.get(ready), states.get(number))
                    progress.update(len(job.entries_of(number)))
                yield done.pop(wanted)
        except RayTaskError as error:
            cause = getattr(error, "cause", None)
            if "No module named" in str(cause):
                missing = str(cause).strip().splitlines()[-1]
                raise OSError(
                    f"a machine of the cluster lacks a module ({missing}): install this package there"
                ) from None
            raise cause if isinstance(cause, ValueError | OSError) else error from None
        except RayError as error:
            raise OSError(
                f"a part failed {1 + RETRIES} times because its worker died, perhaps as memory ran out "
                f"({type(error).__name__}): run the same command again, with fewer workers per machine"
            ) from error
        finally:
            for reference in waiting:
                ray.cancel(reference)


def _make(job: Job, number: int, entries: Any, known: str | None) -> dict[str, bytes] | None:
    """Make a part on a machine of the cluster; return its files but the shards, None if `known` is its fingerprint."""
    fingerprint = find_fingerprint(job, entries)
    if fingerprint == known:
        return None
    with TemporaryDirectory() as name:
        here = replace(job, staging=Path(name))
        folder = here.staging / job.folder_name(number)
        here.data.mkdir()
        write_entries(here, folder, entries, fingerprint, lambda num_records: None)
        return {file: (folder / file).read_bytes() for file in _FILES}


def _take(folder: Path, files: dict[str, bytes] | None, state: dict[str, Any] | None) -> Summary:
    """Write a part's files to its staging folder and return its summary."""
    if files is None:
        assert state is not None
        return summary_of(state, kept=True)
    folder.mkdir(exist_ok=True)
    (folder / store.PART_FILE).unlink(missing_ok=True)
    for name in _FILES:
        write_whole(folder / name, files[name])
    return summary_of(json.loads(files[store.PART_FILE]), kept=False)
