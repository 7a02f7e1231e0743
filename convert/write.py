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
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import xxhash

from convert import lease, store
from convert.items import Found, Item, Summary
from convert.records import BAD_BOXES, BBOX_TYPES
from convert.remote import fetch_files
from recipe.records import CLASSES_FILE, INDEX_FILE, RECORDS_FILE, rename, usable_cores, write_whole
from recipe.redact import redact
from recipe.schema import Sample

if TYPE_CHECKING:
    from convert.divide import Division
    from convert.parts import Job

PART_RECORDS = 1024  # never depends on the number of workers: it decides where shards end
# Those that Streaming knows, without an import of torch to ask it.
HASHES = {name for name in hashlib.algorithms_available if hasattr(hashlib, name) and not name.startswith("shake_")}
HASHES |= set(xxhash.algorithms_available)
WRITE_OPTIONS = ("size_limit", "hashes", "strict", "overwrite")  # of the command line, and keywords of `write_split`


def convert_split(found: Found, out: str, split: str, **options: Any) -> Summary:
    """Write one data set to OUT/SPLIT; see `convert_splits`."""
    return convert_splits(found, out, split, None, **options)[split]


def convert_splits(
    found: Found,
    out: str,
    split: str,
    division: "Division | None",
    *,
    size_limit: int | str = "32mb",
    hashes: Sequence[str] = ("xxh64",),
    strict: bool = False,
    overwrite: bool = False,
    num_workers: int = 1,
    staging: str | None = None,
    restartable: bool = True,
    part_records: int = PART_RECORDS,
    engine: str = "local",
    address: str = "auto",
) -> dict[str, Summary]:
    """Write a data set to OUT/SPLIT, and what `division` holds out to another; rejected records to OUT/rejected.jsonl.

    If it is killed or fails, its finished parts stay: the same call continues after them and ends with the same bytes.
    The number of workers changes no byte. A rerun of one split replaces only that split's lines of rejected.jsonl.
    OUT is a local folder or an object-store address; without a split the data set is OUT itself. Each of two data sets
    is what the conversion of its records alone would be, and neither appears before both are whole.
    `restartable=False`: a failure leaves nothing. For the other keywords see `Job` and `parse_args`.

    Returns:
        The summary of each split.

    Raises:
        ValueError: OUT/SPLIT is taken, or another conversion is writing it; `strict` and a record was rejected;
            nothing was left to write or to hold out; an unknown checksum.
        OSError: The disk or the object store failed, or a worker died.
    """
    # What is held out comes first: it is small, so that a mistake is found early.
    names = [split] if division is None else [division.name, split]
    _check_names(names)
    if unknown := set(hashes) - HASHES:
        raise ValueError(f"--hashes {sorted(unknown)} are unknown: choose from {sorted(HASHES)}")
    if engine == "ray":
        _check_ray(out, division)
    with ExitStack() as stack:
        targets = [_Target(store.join(out, name), staging) for name in names]
        for target in targets:
            stack.enter_context(store.locked(target.folder, target.address, keep=restartable))
        leases = []
        for is_held in (False, True):  # a finished data set is not even touched; and one may be finished by now
            for target in reversed(targets) if any(target.is_remote for target in targets) or not is_held else ():
                target.check(overwrite, was_killed=target is not targets[-1] and not targets[-1].exists)
            if not is_held:
                leases += [stack.enter_context(lease.hold(target.address)) for target in targets]
        from convert import parts  # imports torch, once for all workers

        ray = _connect(address) if engine == "ray" else None  # after the lease's process, as it starts threads
        founds = [found]
        if division is not None:
            from convert.divide import divide

            founds = reversed(divide(found, division, num_workers))
        jobs, summaries = [], {}
        for name, target, part in zip(names, targets, founds, strict=True):
            job = parts.Job(
                entries=part.entries,
                staging=target.folder,
                address=target.address if target.is_remote else None,
                stored=store.list_names(target.address) if target.is_remote else None,
                part_records=part_records,
                hashes=tuple(sorted(set(hashes))),
                size_limit=size_limit,
                strict=strict,
                restartable=restartable,
            )
            jobs.append(job)
            job.data.mkdir(exist_ok=True)
            with _explaining_full_disk(job):
                made = parts.iter_parts(job, num_workers) if ray is None else _iter_on(ray, job)
                summary = summaries[name] = _collect(part, job, made, leases)
                if name and (summary.rejected or summary.samples):
                    store.save_rejected(out, name, summary.rejected)
                _check(summary, strict)
                parts.merge_parts(job)
                _write_classes(job, part.classes)
        for one in leases:
            one.check()
        for job, target in zip(jobs, targets, strict=True):
            with _explaining_full_disk(job):
                target.publish(job)
    return summaries


def _check_names(names: Sequence[str]) -> None:
    """Raise ValueError if a split is not the plain name of a folder, or one of two is in the other."""
    for option, name in zip(("--val-split", "--split")[-len(names) :], names, strict=True):
        is_plain = not (os.path.isabs(name) or set(name.split("/")) & {"", ".", "..", store.REJECTED_FILE})
        if not is_plain and (name or len(names) > 1):
            raise ValueError(f"{option} {name!r} must be the plain name of a folder under --out, such as 'train'")
    if len({name.split("/")[0] for name in names}) < len(names):
        raise ValueError(f"--val-split {names[0]!r} and --split {names[1]!r} must be two folders, none in the other")


class _Target:
    """Where a data set goes, and what is there already."""

    def __init__(self, address: str, staging: str | None) -> None:
        self.address, self.is_remote = address, store.is_remote(address)
        self.folder = store.staging_folder(address, staging)
        self.is_ours = False  # what is there may be what a killed run has published

    @property
    def exists(self) -> bool:
        """Return whether a data set is there."""
        if self.is_remote:
            return store.exists(self.address, INDEX_FILE)
        return (store.local_folder(self.address) / INDEX_FILE).is_file()

    def check(self, overwrite: bool, was_killed: bool) -> None:
        """Raise ValueError if something is there that must stay.

        `was_killed`: of two data sets a run may have published this one and not the other. If its state is still
        there, `publish` decides.
        """
        try:
            store.check_target(self.address, overwrite)
        except ValueError:
            self.is_ours = was_killed and any(self.folder.glob(f"*/{store.PART_FILE}"))
            if not self.is_ours:
                raise

    def publish(self, job: "Job") -> None:
        """Make the data set appear, index.json last; raise ValueError if another is there after all."""
        if self.is_ours:
            stored = [store.read(self.address, name) for name in (INDEX_FILE, RECORDS_FILE)]
            if stored != [(job.data / name).read_bytes() for name in (INDEX_FILE, RECORDS_FILE)]:
                store.check_target(self.address, overwrite=False)
        elif self.is_remote:
            names = [name for name in (CLASSES_FILE, RECORDS_FILE) if (job.data / name).is_file()]
            store.upload(job.data, names, self.address)
            store.upload(job.data, [INDEX_FILE], self.address)
        else:
            target = store.local_folder(self.address)
            if target.exists():
                shutil.rmtree(job.staging / "replaced", ignore_errors=True)
                target.rename(job.staging / "replaced")
            rename(job.data, target)


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

    def origin(self) -> tuple[Sequence[str], bytes]:
        raise NotImplementedError  # it is many records, and never divided

    def read(self) -> Iterator[Item]:
        yield from self.items


def _check_ray(out: str, division: "Division | None") -> None:
    """Raise ValueError for what a conversion on Ray cannot do."""
    if not store.is_remote(out):
        raise ValueError(f"--engine ray writes to an object store: --out {out} is a folder of one machine")
    if division is not None:
        raise ValueError("--val-share reads all images on one machine: leave it out, and set val_fraction in training")


def _connect(address: str) -> Any:
    from convert.on_ray import connect

    return connect(address)


def _iter_on(ray: Any, job: "Job") -> Generator[Summary, None, None]:
    from convert.on_ray import iter_parts

    return iter_parts(job, ray)


def _collect(found: Found, job: "Job", made: Generator[Summary, None, None], leases: Sequence[lease.Lease]) -> Summary:
    """Add up all parts; in strict mode stop at the first rejected record."""
    total = Summary()
    for item in found.leading:
        total.add(item)
        if total.rejected and job.strict:
            return total
    with closing(made):
        for part in made:
            for one in leases:
                one.check()
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


@contextmanager
def _explaining_full_disk(job: "Job") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(_describe_full_disk(job)) from error


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
        samples = [item for entry in shown for item in entry.read() if isinstance(item, Sample)]
        sizes = [len(item.image) for sample in samples for item in sample.per_image()]
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
    parser.add_argument(
        "--num-workers", type=int, default=usable_cores(), help="processes; default: all %(default)s usable cores"
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
        parser.add_argument(
            "--val-share",
            type=float,
            metavar="SHARE",
            help="hold out this share of the images, such as 0.1, into OUT/NAME of --val-split",
        )
        parser.add_argument("--val-split", metavar="NAME", help="name of the part that is held out; default val")
        parser.add_argument(
            "--group-by-prefix",
            metavar="TEXT",
            help="keep images together whose names agree up to the last TEXT, such as _ for cam1_0001.jpg",
        )
        parser.add_argument("--staging", metavar="DIR", help="keeps the state of a conversion to an object store")
        parser.add_argument(
            "--engine", choices=("local", "ray"), default="local", help="processes of this machine, or a Ray cluster"
        )
        parser.add_argument("--address", metavar="HOST:PORT", help="of the Ray cluster; default auto: this machine's")
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
    options = {name: getattr(args, name) for name in (*WRITE_OPTIONS, "num_workers", "staging", "engine")}

    def write() -> dict[str, Summary]:
        division = parse_division(args)
        _check_names([args.split] if division is None else [division.name, args.split])
        if args.engine == "ray":
            _check_ray(args.out, division)
            if args.num_workers != parser.get_default("num_workers"):
                raise ValueError("--num-workers has no effect with --engine ray: all cores of the cluster work")
        elif args.address is not None:
            raise ValueError(f"--address {args.address} has no effect without --engine ray")
        with TemporaryDirectory() as folder:
            fetch_files(args, Path(folder))
            address = args.address or "auto"
            return convert_splits(find(args), args.out, args.split, division, address=address, **options)

    report(write, args.out)


def parse_division(args: argparse.Namespace) -> "Division | None":
    """Return what the command line says about holding images out; raise ValueError if it cannot be."""
    from convert.divide import Division

    if args.val_share is not None:
        return Division(args.val_share, "val" if args.val_split is None else args.val_split, args.group_by_prefix)
    for name in ("val_split", "group_by_prefix"):
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} {getattr(args, name)!r} has no effect without --val-share: give it, such as 0.1"
            )
    return None


def report(write: Callable[[], Mapping[str, Summary]], out: str) -> None:
    """Call `write` and print its summaries, the one of --split first; exit 1 on bad input."""
    try:
        summaries = write()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for split, summary in reversed(list(summaries.items())):
        if summary.kept:
            print(f"{summary.kept} of {summary.parts} parts were kept from an earlier run", file=sys.stderr)
        print(f"{redact(store.join(out, split))}\n{summary}")
    if any(summary.rejected for summary in summaries.values()):
        print(f"  rejected records: {redact(store.join(out, store.REJECTED_FILE))}")
