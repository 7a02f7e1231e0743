"""The argument parser and the printed summary of every converter."""

import argparse
import sys
from collections.abc import Callable, Iterable

from convert import store
from convert.items import Found, Item, Summary
from convert.pool import usable_cores
from convert.target import REJECTED_FILE
from convert.writer import convert_split, write_split
from recipe.redact import redact


def build_parser(description: str | None, with_split: bool = True) -> argparse.ArgumentParser:
    """The arguments that every converter takes; the caller adds its own.

    Args:
        description: The module's docstring.
        with_split: For `run`, which takes splits and workers; else for `run_items`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="OUT", help="local folder or object-store address")
    parser.add_argument("--size-limit", default="32mb", help="of one shard; default %(default)s")
    parser.add_argument(
        "--hashes", nargs="*", default=["xxh64"], help="checksums kept in the index; default xxh64, none: --hashes"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first bad record")
    parser.add_argument("--overwrite", action="store_true", help="replace the data set in a local OUT")
    if with_split:
        parser.add_argument("--split", required=True, help="shards go to OUT/SPLIT: Stream(local=OUT, split=SPLIT)")
        parser.add_argument("--staging", help="folder for the state of a conversion to an object store")
        add_num_workers(parser)
    return parser


def add_num_workers(parser: argparse.ArgumentParser) -> None:
    """The argument `--num-workers`."""
    parser.add_argument(
        "--num-workers", type=int, default=usable_cores(), help="processes; default: the usable cores, %(default)s"
    )


def run(find: Callable[[], Found], args: argparse.Namespace) -> None:
    """Converts with the arguments of `build_parser`, prints the summary; exits 1 on bad input.

    Args:
        find: Reads the annotations.
        args: Of a parser from `build_parser`.
    """
    try:
        summary = convert_split(
            find(),
            args.out,
            args.split,
            size_limit=args.size_limit,
            hashes=args.hashes,
            strict=args.strict,
            overwrite=args.overwrite,
            num_workers=args.num_workers,
            staging=args.staging,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if summary.kept:
        print(f"{summary.kept} of {summary.parts} parts were kept from an earlier run", file=sys.stderr)
    _report(summary, store.join(args.out, args.split), args.out)


def run_items(items: Iterable[Item], args: argparse.Namespace) -> None:
    """Writes `items` to `args.out` itself, as `run` else does."""
    try:
        summary = write_split(
            items,
            args.out,
            "",
            size_limit=args.size_limit,
            hashes=args.hashes,
            strict=args.strict,
            overwrite=args.overwrite,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    _report(summary, args.out, args.out)


def _report(summary: Summary, address: str, out: str) -> None:
    print(f"{redact(address)}\n{summary}")
    if summary.rejected:
        print(f"  the rejected records: {redact(store.join(out, REJECTED_FILE))}")
