"""The one MDS writer, argument parser and printed summary of every converter.

A converter is `iter_samples(...) -> Iterator[Item]` and a short `main()`. It yields what it found, in order: a
`Sample`, a `Rejected` record, or a `Note` of what it mended or left out on the way. Everything after that is here.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlparse

from streaming import MDSWriter
from streaming.base.storage import CloudDownloader, CloudUploader
from tqdm import tqdm

from recipe.schema import MDS_COLUMNS, Sample

REJECTED_FILE = "rejected.jsonl"


@dataclass(frozen=True)
class Rejected:
    """A record that was left out.

    Attributes:
        id: As far as it is known, else empty.
        source: The file, and the line or entry in it.
        reason: One of few, counted in the summary.
        detail: The offending value.
    """

    id: str
    source: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Note:
    """Something done to `count` parts of good records, such as boxes clipped by rounding. Strict lets it pass."""

    what: str
    count: int


Item = Sample | Rejected | Note


@dataclass
class Summary:
    """What one run wrote."""

    samples: int = 0
    pictures: int = 0
    not_annotated: int = 0
    empty: int = 0
    objects: int = 0
    crowd: int = 0
    shards: int = 0
    num_bytes: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)

    def add(self, sample: Sample) -> None:
        """Counts one written sample."""
        self.samples += 1
        self.pictures += bool(sample.image)
        if sample.objects is None:
            self.not_annotated += 1
            return
        self.empty += not sample.objects
        self.objects += len(sample.objects)
        self.crowd += sum(item.iscrowd for item in sample.objects)

    def __str__(self) -> str:
        lines = [
            f"  samples   {self.samples:>8}  ({self.pictures} with a picture, {self.empty} known to hold nothing, "
            f"{self.not_annotated} not annotated)",
            f"  objects   {self.objects:>8}  ({self.crowd} crowd regions)",
            f"  shards    {self.shards:>8}  ({self.num_bytes / 2**20:.1f} MiB)",
        ]
        lines += [f"  note      {count:>8}  {what}" for what, count in self.notes.most_common()]
        lines += [f"  rejected  {self.rejected.total():>8}"]
        lines += [f"            {count:>8}  {reason}" for reason, count in self.rejected.most_common()]
        return "\n".join(lines)


class _ShardWriter(MDSWriter):
    """`MDSWriter`, which flushes an empty shard when the first sample alone is over `size_limit`."""

    def flush_shard(self) -> None:
        if self.new_samples:
            super().flush_shard()


def build_parser(description: str | None, with_split: bool = True) -> argparse.ArgumentParser:
    """The arguments that every converter takes; the caller adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="OUT", help="local folder or object-store address")
    if with_split:
        parser.add_argument("--split", required=True, help="shards go to OUT/SPLIT: Stream(local=OUT, split=SPLIT)")
    parser.add_argument("--size-limit", default="32mb", help="of one shard; default %(default)s")
    parser.add_argument(
        "--hashes", nargs="*", default=["xxh64"], help="checksums kept in the index; default xxh64, none: --hashes"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first bad record")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards in a local OUT/SPLIT")
    return parser


def run(items: Iterable[Item], args: argparse.Namespace, split: str, total: int | None = None) -> None:
    """Writes `items` with the arguments of `build_parser`, prints the summary; exits 1 on bad input.

    Args:
        items: What the converter yields.
        args: Of a parser from `build_parser`.
        split: Folder under `args.out`; empty: the shards go to `args.out` itself.
        total: Length of `items` for the progress bar, where known.
    """
    try:
        summary = write_split(
            tqdm(items, total=total, unit=" records", file=sys.stderr, disable=None),
            args.out,
            split,
            size_limit=args.size_limit,
            hashes=sorted(set(args.hashes)),
            strict=args.strict,
            overwrite=args.overwrite,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{_join(args.out, split)}\n{summary}")
    if summary.rejected:
        print(f"  the rejected records: {_join(args.out, REJECTED_FILE)}")


def write_split(
    items: Iterable[Item],
    out: str,
    split: str,
    *,
    size_limit: int | str = "32mb",
    hashes: list[str] | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Writes the samples as MDS shards to OUT/SPLIT and the rejected records to OUT/rejected.jsonl.

    A local OUT/SPLIT appears at once, when everything is written: shards are made in a hidden folder beside it, which
    is removed if anything fails. To an object store shards are sent as they are made and index.json last; the
    rejected records follow it there. A rerun of one split replaces only that split's lines of rejected.jsonl.

    Args:
        items: What a converter yields; ids unique, which `RecordReader` sees to.
        out: Local folder or object-store address.
        split: Folder under `out`; empty: `out` itself.
        size_limit: Bytes of one shard, as `MDSWriter` takes it.
        hashes: Checksums kept in the index.
        strict: Stop at the first rejected record.
        overwrite: Replace a local OUT/SPLIT that holds shards.

    Raises:
        ValueError: OUT/SPLIT is not empty; `strict` and a record was rejected; nothing was left to write.
    """
    if split and (os.path.isabs(split) or set(split.split("/")) & {"", ".", "..", REJECTED_FILE}):
        raise ValueError(f"--split {split!r} is to be the plain name of a folder under --out, such as 'train'")
    summary, rejected = Summary(), []
    with _open_writer(_join(out, split), hashes or [], size_limit, overwrite) as writer:
        try:
            _write_items(items, writer, summary, rejected, strict)
        except ValueError:
            if rejected:
                _save_rejected(out, split, rejected)
            raise
    if split:
        _save_rejected(out, split, rejected)
    summary.shards = len(writer.shards)
    summary.num_bytes = sum(shard["raw_data"]["bytes"] for shard in writer.shards)
    return summary


@contextmanager
def _open_writer(address: str, hashes: list[str], size_limit: int | str, overwrite: bool) -> Iterator[MDSWriter]:
    """An `MDSWriter` whose index appears at `address` only when the block ends well."""
    target = None if urlparse(address).scheme else Path(address).expanduser()
    if target is None:
        part = Path(tempfile.mkdtemp())
    else:
        _check_target(target, overwrite)
        part = target.parent / f".{target.name}.part-{os.getpid()}"
    out = (str(part), address) if target is None else str(part)
    try:
        # Not `with`: MDSWriter's __exit__ writes an index that looks complete after an exception.
        writer = _ShardWriter(columns=dict(MDS_COLUMNS), out=out, hashes=hashes, size_limit=size_limit)
        try:
            if target is None:
                _check_remote(writer.cloud_writer, address)
            yield writer
            writer.finish()
        finally:
            writer.cancel_future_jobs()
        if target is not None:
            if target.exists():
                shutil.rmtree(target)
            part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_items(
    items: Iterable[Item], writer: MDSWriter, summary: Summary, rejected: list[Rejected], strict: bool
) -> None:
    """Writes every sample, fills `summary` and `rejected`."""
    for item in items:
        if isinstance(item, Note):
            summary.notes[item.what] += item.count
            continue
        if isinstance(item, Sample):
            writer.write(item.to_mds())
            summary.add(item)
            continue
        rejected.append(item)
        summary.rejected[item.reason] += 1
        if strict:
            raise ValueError(
                f"{item.source} (id {item.id!r}): {item.reason}: {item.detail}. Mend the record, or leave --strict out "
                "to convert without it"
            )
    if not summary.samples:
        raise ValueError(f"nothing to write: no record was good\n{summary}")


def _join(out: str, name: str) -> str:
    return os.path.join(out, name) if name else out


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuses to write over anything but the shards the user said to replace."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"{target} is a link or a file: name a folder")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{target} is not empty: choose another --out or --split, or replace it with --overwrite")
    if not (target / "index.json").is_file():
        raise ValueError(f"{target} holds no index.json, so it is not a data set that --overwrite may replace")


def _check_remote(uploader: CloudUploader, address: str) -> None:
    try:
        objects = uploader.list_objects("")
    except NotImplementedError:  # some of Streaming's stores cannot list
        return
    if objects:
        raise ValueError(f"{address} is not empty: choose another --out or --split, or empty it (--overwrite is local)")


def _save_rejected(out: str, split: str, rejected: list[Rejected]) -> None:
    """Replaces the lines of `split` in OUT/rejected.jsonl, keeps those of the other splits."""
    lines = [json.dumps({"split": split, **asdict(item)}) for item in rejected]
    if urlparse(out).scheme == "":
        folder = Path(os.path.expanduser(out))
        folder.mkdir(parents=True, exist_ok=True)
        _merge_lines(folder / REJECTED_FILE, split, lines)
        return
    with tempfile.TemporaryDirectory() as folder:
        uploader = CloudUploader.get((folder, out))
        try:
            names = uploader.list_objects(REJECTED_FILE) or []
        except NotImplementedError:
            names = []
        path = Path(folder) / REJECTED_FILE
        if any(name.endswith(REJECTED_FILE) for name in names):
            CloudDownloader.direct_download(_join(out, REJECTED_FILE), str(path))
        _merge_lines(path, split, lines)
        uploader.upload_file(REJECTED_FILE)


def _merge_lines(path: Path, split: str, lines: list[str]) -> None:
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in old if json.loads(line)["split"] != split]
    new = path.with_name(f".{path.name}.part-{os.getpid()}")
    new.write_text("".join(f"{line}\n" for line in kept + lines), encoding="utf-8")
    new.replace(path)
