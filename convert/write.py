"""From what a converter found to a data set: MDS shards, their index and records; and the command line of converters.

Parts are made by one process or several (`convert/parts.py`) in a hidden staging folder. What readers look for,
OUT/SPLIT or the index.json in an object store, appears last and whole.
"""

import argparse
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from convert import store
from convert.items import Found, Item, Summary
from convert.records import BAD_BOXES, BBOX_TYPES
from recipe.records import CLASSES_FILE, INDEX_FILE, RECORDS_FILE, rename, write_whole
from recipe.redact import redact
from recipe.schema import Sample

if TYPE_CHECKING:
    from convert.parts import Job

PART_RECORDS = 1024  # never depends on the number of workers: it decides where shards end
# Those that Streaming knows, without an import of torch to ask it.
HASHES = {name for name in hashlib.algorithms_available if hasattr(hashlib, name) and not name.startswith("shake_")}
HASHES |= set(xxhash.algorithms_available)
WRITE_OPTIONS = ("size_limit", "hashes", "strict", "overwrite")  # of the command line, and keywords of `write_split`


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
    """Write a data set to OUT/SPLIT and its rejected records to OUT/rejected.jsonl.

    If it is killed or fails, its finished parts stay: the same call continues after them and ends with the same bytes.
    The number of workers changes no byte. A rerun of one split replaces only that split's lines of rejected.jsonl.
    OUT is a local folder or an object-store address; without a split the data set is OUT itself. `restartable=False`: a
    failure leaves nothing. For the other keywords see `Job` and `parse_args`.

    Raises:
        ValueError: OUT/SPLIT is taken, or another conversion is writing it; `strict` and a record was rejected;
            nothing was left to write; an unknown checksum.
        OSError: The disk or the object store failed, or a worker died.
    """
    if split and (os.path.isabs(split) or set(split.split("/")) & {"", ".", "..", store.REJECTED_FILE}):
        raise ValueError(f"--split {split!r} must be the plain name of a folder under --out, such as 'train'")
    if unknown := set(hashes) - HASHES:
        raise ValueError(f"--hashes {sorted(unknown)} are unknown: choose from {sorted(HASHES)}")
    address = store.join(out, split)
    remote = store.is_remote(address)
    folder = store.staging_folder(address, staging)
    with store.locked(folder, address, keep=restartable):
        store.check_target(address, overwrite)
        from convert import parts  # imports torch, once for all workers

        job = parts.Job(
            entries=found.entries,
            staging=folder,
            address=address if remote else None,
            stored=store.list_names(address) if remote else None,
            part_records=part_records,
            hashes=tuple(sorted(set(hashes))),
            size_limit=size_limit,
            strict=strict,
            restartable=restartable,
        )
        job.data.mkdir(exist_ok=True)
        try:
            summary = _collect(found, job, parts.iter_parts(job, num_workers))
            if split and (summary.rejected or summary.samples):
                store.save_rejected(out, split, summary.rejected)
            _check(summary, strict)
            parts.merge_parts(job)
            _write_classes(job, found.classes)
            _publish(job, address)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(_describe_full_disk(job)) from error
    return summary


def write_split(items: Iterable[Item], out: str, split: str, **options: Any) -> Summary:
    """Write any iterable as `convert_split` does with these options, but as one part; a failure leaves nothing.

    The samples' ids must be unique.
    """
    return convert_split(Found([_Whole(items)]), out, split, restartable=False, **options)


@dataclass(frozen=True)
class _Whole:
    """All items as one entry."""

    items: Iterable[Item]

    def fingerprint(self) -> str:
        return ""

    def read(self) -> Iterator[Item]:
        yield from self.items


def _collect(found: Found, job: "Job", made: Generator[Summary, None, None]) -> Summary:
    """Add up all parts; in strict mode stop at the first rejected record."""
    total = Summary()
    for item in found.leading:
        total.add(item)
        if total.rejected and job.strict:
            return total
    with closing(made):
        for part in made:
            total.merge(part)
            total.parts += 1
            if total.rejected and job.strict:
                break
    return total


def _check(summary: Summary, strict: bool) -> None:
    """Raise if the data set must not appear: it is empty, or `strict` and a record was rejected."""
    first = [f"{item.source} (id {item.id!r}): {item.reason}: {item.detail}" for item in summary.rejected[:1]]
    if strict and first:
        raise ValueError(f"{first[0]}. Fix the record, or leave --strict out to convert without it")
    if not summary.samples:
        raise ValueError("; ".join(["nothing to write: no record is usable", *first]) + f"\n{summary}")


def _write_classes(job: "Job", classes: Sequence[str]) -> None:
    """Write the names of the source's classes, one per line, as they are in captions."""
    names = list(dict.fromkeys(name for name in classes if name))
    if names and all(len(name.splitlines()) == 1 for name in names):
        write_whole(job.data / CLASSES_FILE, "".join(f"{name}\n" for name in names).encode())


def _publish(job: "Job", address: str) -> None:
    """Make the data set appear at `address`, index.json last."""
    if job.address is not None:
        names = [name for name in (CLASSES_FILE, RECORDS_FILE) if (job.data / name).is_file()]
        store.upload(job.data, names, address)
        store.upload(job.data, [INDEX_FILE], address)
        return
    target = store.local_folder(address)
    if target.exists():
        shutil.rmtree(job.staging / "replaced", ignore_errors=True)
        target.rename(job.staging / "replaced")
    rename(job.data, target)


def _describe_full_disk(job: "Job") -> str:
    """Return how far the conversion came, what the rest needs, and what to do."""
    place, total = job.staging.parent, len(job.folders)
    finished = sum((folder / store.PART_FILE).is_file() for folder in job.folders)
    text = f"the disk of {place} is full, {shutil.disk_usage(place).free / 2**30:.2f} GiB are free"
    if finished and job.address is None:
        written = sum(path.stat().st_size for path in job.data.rglob("*") if path.is_file())
        rest = written / finished * (total - finished)
        text += f"; the {total - finished} parts of {total} that are missing need about {rest / 2**30:.2f} GiB"
    elif job.restartable:
        shown = job.entries[:: max(1, len(job.entries) // 32)]
        sizes = [len(item.image) for entry in shown for item in entry.read() if isinstance(item, Sample)]
        needed = sum(sizes) / max(1, len(shown)) * len(job.entries)
        text += f"; all {len(job.entries)} records need about {needed / 2**30:.2f} GiB"
    text += ". Make room, then run the same command again"
    return text + (": it continues after the finished parts" if finished and job.restartable else "")


class _RequiredFirst(argparse.RawDescriptionHelpFormatter):
    """A --help that shows the required options first."""

    def add_usage(self, usage: Any, actions: Iterable[argparse.Action], groups: Any, prefix: Any = None) -> None:
        super().add_usage(usage, sorted(actions, key=lambda action: not action.required), groups, prefix)

    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        super().add_arguments(sorted(actions, key=lambda action: not action.required))


def build_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for `python -m convert.NAME`."""
    return argparse.ArgumentParser(f"python -m convert.{name}", None, description, formatter_class=_RequiredFirst)


def add_num_workers(parser: argparse.ArgumentParser) -> None:
    """Add the argument `--num-workers`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument(
        "--num-workers", type=int, default=cores, help="processes; default: all %(default)s usable cores"
    )


def add_box_options(parser: argparse.ArgumentParser, bbox_type: str | None = None) -> None:
    """Add what formats of images and boxes take, `bbox_type` being what the format's boxes are; see `box_options`."""
    default = bbox_type or "real, but a set whose boxes all lie within 0 to 1 is refused"
    parser.add_argument(
        "--follow-links", action="store_true", help="also read images that are links to files outside --images"
    )
    parser.add_argument(
        "--bbox-type",
        choices=sorted(BBOX_TYPES),
        help="what the numbers of all boxes are: pixels (real), or parts of the image of 0 to 1 or 0 to 1000; "
        f"default {default}",
    )
    parser.add_argument(
        "--bad-boxes",
        choices=BAD_BOXES,
        default="reject",
        help="reject the image of a flat, inverted or overhanging box (default), or drop the box: it is clipped to the "
        "image or left out, with a note",
    )


def box_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keywords of `list_records` that `add_box_options` added."""
    return {"bbox_type": args.bbox_type, "bad_boxes": args.bad_boxes, "follow_links": args.follow_links}


def parse_args(parser: argparse.ArgumentParser, with_split: bool = True) -> argparse.Namespace:
    """Add the arguments that all converters take, `with_split` also those of `convert_split`, and parse."""
    parser.add_argument("--out", required=True, metavar="OUT", help="local folder or object-store address")
    if with_split:
        parser.add_argument(
            "--split",
            required=True,
            metavar="NAME",
            help="name of this part of the data, such as train: goes to OUT/NAME",
        )
        parser.add_argument("--staging", metavar="DIR", help="keeps the state of a conversion to an object store")
        add_num_workers(parser)
    parser.add_argument("--size-limit", default="32mb", metavar="SIZE", help="of one shard; default %(default)s")
    parser.add_argument(
        "--hashes", nargs="*", default=["xxh64"], help="checksums kept in the index; default xxh64, none: --hashes"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first bad record")
    parser.add_argument("--overwrite", action="store_true", help="replace the data set in a local OUT")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if isinstance(value, Path):  # shells leave the ~ of --images=~/x
            setattr(args, name, value.expanduser())
    return args


def run(parser: argparse.ArgumentParser, find: Callable[[argparse.Namespace], Found]) -> None:
    """Parse the command line, convert what `find` reads, print the summary; exit 1 on bad input."""
    args = parse_args(parser)
    options = {name: getattr(args, name) for name in (*WRITE_OPTIONS, "num_workers", "staging")}
    report(lambda: convert_split(find(args), args.out, args.split, **options), args.out, args.split)


def report(write: Callable[[], Summary], out: str, split: str = "") -> None:
    """Call `write` and print its summary; exit 1 on bad input."""
    try:
        summary = write()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if summary.kept:
        print(f"{summary.kept} of {summary.parts} parts were kept from an earlier run", file=sys.stderr)
    print(f"{redact(store.join(out, split))}\n{summary}")
    if summary.rejected:
        print(f"  rejected records: {redact(store.join(out, store.REJECTED_FILE))}")
