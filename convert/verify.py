"""Check a converted data set on this machine: index, shards, checksums, rows, sidecar; with --decode every image.

    python -m convert.verify --local OUT --split train [--decode]

It prints one line for each problem, with its remedy, and exits 1 if there is any.
"""

import hashlib
import json
import multiprocessing
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from convert.write import add_num_workers, build_parser
from recipe.images import open_image
from recipe.records import INDEX_FILE, RECORDS_FILE, file_pairs, parse_index, read_records, to_record
from recipe.schema import Sample

_AGAIN = "convert the data set again, or copy the file again from where it is whole"


def read_index(folder: Path) -> dict[str, Any]:
    """Return the parsed index.json.

    Raises:
        ValueError: It is missing, no index of MDS shards, or names files outside `folder`.
    """
    path = folder / INDEX_FILE
    try:
        index = parse_index(path)
        shards = index["shards"]
        files = [file for shard in shards for pair in file_pairs(shard) for file in pair if file]
        unlike = [shard for shard in shards if shard["format"] != "mds" or shard["samples"] < 1]
        unlike += [file for file in files if file.bytes < 1 or not isinstance(file.hashes, dict)]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: name the folder of a converted data set") from error
    except ValueError as error:
        raise ValueError(f"{path} {error}: {_AGAIN}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an index of MDS shards ({error!r}): {_AGAIN}") from error
    if not files or unlike:
        raise ValueError(f"{path} lists no MDS shards, or empty ones: {_AGAIN}")
    if len({file.basename for file in files}) < len(files):
        raise ValueError(f"{path} lists one file twice: {_AGAIN}")
    return index


def verify(folder: Path, decode: bool = False, num_workers: int = 1) -> Iterator[str]:
    """Yield a line for each problem of the data set in `folder`; with `decode` also decode every image."""
    try:
        index = read_index(folder)
    except ValueError as error:
        yield str(error)
        return
    shards = index["shards"]
    digests: list[list[bytes | None]] = []  # of the rows of each shard
    import streaming.base.format  # noqa: F401  # imports torch, once for all workers

    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(max(1, num_workers), context) as executor:
        checks = executor.map(partial(check_shard, folder, decode=decode), shards)
        total = sum(shard["samples"] for shard in shards)
        with tqdm(total=total, unit=" samples", file=sys.stderr, disable=None) as bar:
            for shard, (found, problems) in zip(shards, checks, strict=True):
                yield from problems
                digests.append(found)
                bar.update(shard["samples"])
    yield from _check_sidecar(folder / RECORDS_FILE, index, digests)


def check_shard(folder: Path, shard: Mapping[str, Any], decode: bool) -> tuple[list[bytes | None], list[str]]:
    """Check one shard, an entry of the index; with `decode` also decode every image.

    Returns:
        For each sample a digest of its row without the image, None if it cannot be read; and the problems.
    """
    file = shard["raw_data"]
    path = folder / file["basename"]
    nothing: list[bytes | None] = [None] * shard["samples"]
    if not path.is_file():
        return nothing, [f"{path}: is missing: {_AGAIN}"]
    size = path.stat().st_size
    if size != file["bytes"]:
        return nothing, [f"{path}: holds {size} bytes, the index says {file['bytes']}: {_AGAIN}"]
    from streaming.base.format import reader_from_json  # imports torch
    from streaming.base.hashing import get_hash, is_hash

    data, problems = path.read_bytes(), []
    for name, expected in file["hashes"].items():
        if not is_hash(name):
            problems.append(f"{path}: has the unknown checksum {name}: {_AGAIN}")
        elif get_hash(name, data) != expected:
            problems.append(f"{path}: {name} is {get_hash(name, data)}, the index says {expected}: {_AGAIN}")
    del data
    try:
        reader = reader_from_json(str(folder), None, dict(shard))
        reader.validate(allow_unsafe_types=False)
    except Exception as error:  # Streaming raises whatever a wrong entry leads to
        return nothing, [*problems, f"{path}: the index does not describe a readable shard ({error!r}): {_AGAIN}"]
    digests: list[bytes | None] = []
    for position in range(shard["samples"]):
        digest = None
        try:
            sample = Sample.from_mds(reader[position])
            digest = _digest(sample)
            for item in sample.per_image():
                _check_image(item, decode)
        except Exception as error:  # as above, for wrong bytes
            problems.append(f"{path}: sample {position}: {type(error).__name__}: {error}: {_AGAIN}")
        digests.append(digest)
    return digests, problems


def _check_image(sample: Sample, decode: bool) -> None:
    if bool(sample.image) != bool(sample.width and sample.height):
        raise ValueError(f"{sample.id!r} is {sample.width}x{sample.height} with {len(sample.image)} bytes of image")
    if decode and sample.image:
        size = open_image(sample.image).size
        if size != (sample.width, sample.height):
            raise ValueError(f"{sample.id!r} should be {sample.width}x{sample.height}, its image is {size}")


def _check_sidecar(path: Path, index: Mapping[str, Any], digests: Sequence[Sequence[bytes | None]]) -> Iterator[str]:
    if not path.is_file():
        yield f"{path}: is missing: convert the data set again"
        return
    places = [
        (shard["raw_data"]["basename"], position, digest)
        for shard, rows in zip(index["shards"], digests, strict=True)
        for position, digest in enumerate(rows)
    ]
    try:
        for sample, (name, position, digest) in zip(read_records(path, index), places, strict=True):
            if digest is not None and digest != _digest(sample):
                yield f"{path}: differs from sample {position} of {name} ({sample.id!r}): convert the data set again"
    except ValueError as error:
        yield str(error)


def _digest(sample: Sample) -> bytes:
    # A sample from the sidecar has no image to hash.
    return hashlib.sha256(json.dumps(to_record(sample.without_bytes()), sort_keys=True).encode()).digest()


def main() -> None:
    """Run the command line."""
    parser = build_parser("verify", __doc__)
    parser.add_argument("--local", type=Path, required=True, metavar="DIR", help="the data set's folder")
    parser.add_argument("--split", default="", metavar="NAME", help="folder of the shards under --local")
    parser.add_argument("--decode", action="store_true", help="decode every image, too")
    add_num_workers(parser)
    args = parser.parse_args()
    folder = args.local.expanduser() / args.split
    num_problems = 0
    for problem in verify(folder, args.decode, args.num_workers):
        num_problems += 1
        tqdm.write(problem)
    if num_problems:
        tqdm.write(f"{folder}: {num_problems} problems")
        sys.exit(1)
    shards = read_index(folder)["shards"]
    unhashed = sum(not shard["raw_data"]["hashes"] for shard in shards)
    print(f"{folder}: {len(shards)} shards, {sum(shard['samples'] for shard in shards)} samples, no problem")
    if unhashed:
        print(f"  {unhashed} of them have no checksum: convert without --hashes to have them")


if __name__ == "__main__":
    main()
