"""From what a converter found to a data set: MDS shards, the sidecar of records, the rejected records.

Parts are made (`convert/parts.py`) by this process or several (`convert/pool.py`) in a hidden staging folder. What
readers look for, OUT/SPLIT or the index.json in an object store, appears last and whole (`convert/target.py`).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from streaming.base.hashing import get_hashes

from convert import store
from convert.items import Found, Item, Rejected, Summary
from convert.parts import PART_RECORDS, Job
from convert.pool import iter_parts
from convert.target import check_split, check_target, locked, publish, save_rejected, staging_folder


def convert_split(
    found: Found,
    out: str,
    split: str,
    *,
    size_limit: int | str = "32mb",
    hashes: Sequence[str] = ("xxh64",),
    strict: bool = False,
    overwrite: bool = False,
    num_workers: int = 1,
    staging: str | None = None,
    restartable: bool = True,
    part_records: int = PART_RECORDS,
) -> Summary:
    """Writes a data set to OUT/SPLIT and its rejected records to OUT/rejected.jsonl.

    Killed or failed, it leaves its finished parts: the same call goes on after them and ends with the same bytes. The
    number of workers changes no byte. A rerun of one split replaces only that split's lines of rejected.jsonl.

    Args:
        found: From a converter.
        out: Local folder or object-store address.
        split: Folder under `out`; empty: `out` itself.
        size_limit: Bytes of one shard, as `MDSWriter` takes it.
        hashes: Checksums kept in the index.
        strict: Stop at the first rejected record.
        overwrite: Replace a local OUT/SPLIT that holds shards.
        num_workers: Processes; 0 or 1: this one alone.
        staging: Folder for the state of conversions to object stores; default: in the temporary folder.
        restartable: Else a failure leaves nothing.
        part_records: Records of a part.

    Raises:
        ValueError: OUT/SPLIT is taken, or another conversion is writing it; `strict` and a record was rejected;
            nothing was left to write; an unknown checksum.
        OSError: The disk or the object store failed, or a worker died.
    """
    check_split(split)
    unknown = set(hashes) - get_hashes()
    if unknown:
        raise ValueError(f"--hashes {sorted(unknown)} are unknown: choose from {sorted(get_hashes())}")
    address = store.join(out, split)
    folder = staging_folder(address, staging)
    with locked(folder, address, keep=restartable):
        check_target(address, overwrite)
        remote = store.is_remote(address)
        job = Job(
            entries=found.entries,
            staging=folder,
            address=address if remote else None,
            stored=store.list_names(address, "shard.") if remote else None,
            part_records=part_records,
            hashes=tuple(sorted(set(hashes))),
            size_limit=size_limit,
            strict=strict,
            restartable=restartable,
        )
        job.data.mkdir(exist_ok=True)
        summary, shards, rejected = _collect(found, job, num_workers)
        if split and (rejected or summary.samples):
            save_rejected(out, split, rejected)
        if strict and rejected:
            item = rejected[0]
            raise ValueError(
                f"{item.source} (id {item.id!r}): {item.reason}: {item.detail}. Mend the record, or leave --strict out "
                "to convert without it"
            )
        if not summary.samples:
            raise ValueError(f"nothing to write: no record was good\n{summary}")
        publish(job, address, shards)
    return summary


def write_split(
    items: Iterable[Item],
    out: str,
    split: str,
    *,
    size_limit: int | str = "32mb",
    hashes: Sequence[str] = ("xxh64",),
    strict: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Writes any iterable as `convert_split` does, in this process and as one part; a failure leaves nothing.

    Args:
        items: In order; the ids of the samples are unique.
        out: Local folder or object-store address.
        split: Folder under `out`; empty: `out` itself.
        size_limit: Bytes of one shard.
        hashes: Checksums kept in the index.
        strict: Stop at the first rejected record.
        overwrite: Replace a local OUT/SPLIT that holds shards.

    Raises:
        ValueError: As `convert_split`.
        OSError: As `convert_split`.
    """
    return convert_split(
        Found([_Whole(items)]),
        out,
        split,
        size_limit=size_limit,
        hashes=hashes,
        strict=strict,
        overwrite=overwrite,
        restartable=False,
    )


@dataclass(frozen=True)
class _Whole:
    """All items as one entry."""

    items: Iterable[Item]

    def fingerprint(self) -> str:
        return ""

    def read(self) -> Iterator[Item]:
        yield from self.items


def _collect(found: Found, job: Job, num_workers: int) -> tuple[Summary, list[dict[str, Any]], list[Rejected]]:
    """Makes all parts; in strict mode ends at the first rejected record."""
    summary, shards, rejected = Summary(parts=job.num_parts), [], []
    for item in found.leading:
        summary.add(item)
        if isinstance(item, Rejected):
            rejected.append(item)
            if job.strict:
                return summary, shards, rejected
    with closing(iter_parts(job, num_workers)) as parts:
        for part in parts:
            summary.merge(part.summary)
            summary.kept += part.kept
            shards += part.shards
            rejected += part.rejected
            if job.strict and rejected:
                break
    summary.shards = len(shards)
    summary.num_bytes = sum(shard["raw_data"]["bytes"] for shard in shards)
    return summary, shards, rejected
