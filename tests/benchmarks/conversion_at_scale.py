"""Measure how the files next to the shards grow: synthetic entries of N samples, written and read as a run would.

    python tests/benchmarks/conversion_at_scale.py 1000000 [--image-kb 160]

No image is made. A sample is an image of 640 x 480 with seven objects; a shard holds 32 MB of images, a part 1,024
samples. Its first record and shard entry are real; the others differ in their numbers. Seconds are of one core, `gb` is
the memory that is added. The last line is JSON, with what 100 million samples would take: times 100 M / N, which is an
extrapolation. Requests are counted, not made: per image a HEAD and a GET, as Streaming's S3 client makes them. What a
plan of packs takes is measured by `plan_cost.py`, what an image takes by `conversion_speed.py`.
"""

import argparse
import gzip
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streaming import MDSWriter
from streaming.base.format import reader_from_json

from convert.write import PART_RECORDS
from recipe.records import INDEX_FILE, RECORDS_FILE, join_parts, parse_index, read_records, to_record, write_part
from recipe.records import write_whole as write
from recipe.schema import MDS_COLUMNS, Object, Sample

TARGET = 100_000_000
SHARD_BYTES = 32 * 2**20


def make_sample(number: int) -> Sample:
    """Return a sample of seven objects with captions of a few words."""
    boxes = [(10.5 + k, 20.25 + number % 97, 110.75 + k, 240.5 + number % 89) for k in range(7)]
    objects = tuple(Object(box, f"a small object number {(number + k) % 1000}") for k, box in enumerate(boxes))
    return Sample(f"train2017/{number:012d}.jpg", number.to_bytes(8, "big"), 640, 480, objects, None)


def shard_entry(folder: Path) -> dict[str, Any]:
    """Return the entry of a real shard in an index."""
    with MDSWriter(columns=dict(MDS_COLUMNS), out=str(folder), hashes=["xxh64"]) as writer:
        writer.write(make_sample(0).to_mds())
    return json.loads((folder / INDEX_FILE).read_bytes())["shards"][0]


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=int)
    parser.add_argument("--image-kb", type=int, default=160)
    args = parser.parse_args()
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start, before = time.perf_counter(), peak_gb()
        result = work()
        found[f"{name}_seconds"] = time.perf_counter() - start
        found[f"{name}_gb"] = peak_gb() - before
        return result

    num_parts = -(-args.samples // PART_RECORDS)
    per_shard = SHARD_BYTES // (args.image_kb * 1024)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entry, shards = shard_entry(folder / "one"), []
        left = args.samples
        for part in range(num_parts):
            in_part = min(PART_RECORDS, left)
            left -= in_part
            for number in range(-(-in_part // per_shard)):
                count = min(per_shard, in_part - number * per_shard)
                data = {"basename": f"{part:05d}/shard.{number:05d}.mds", "bytes": count * args.image_kb * 1024}
                raw = {**entry["raw_data"], **data, "hashes": {"xxh64": f"{part * 7 + number:016x}"}}
                shards.append({**entry, "raw_data": raw, "samples": count})
        index: dict[str, Any] = {"version": 2, "shards": shards}
        one = folder / "part.gz"
        write_part(one, (to_record(make_sample(number)) for number in range(min(PART_RECORDS, args.samples))))
        timed("index_write", lambda: write(folder / INDEX_FILE, json.dumps(index, sort_keys=True).encode()))
        timed("records_join", lambda: join_parts(folder / RECORDS_FILE, [one] * num_parts, index))
        num_shards = len(shards)
        index, shards = {}, []
        parsed = timed("index_read", lambda: parse_index(folder / INDEX_FILE))
        timed("readers", lambda: [reader_from_json(str(folder), None, shard) for shard in parsed["shards"]])
        some = min(args.samples, 200 * PART_RECORDS)
        short = {"version": 2, "shards": [{**entry, "samples": some}]}
        join_parts(folder / "some.gz", [one] * (some // PART_RECORDS or 1), short)
        timed("records_read", lambda: sum(1 for _ in read_records(folder / "some.gz", short)))
        found["records_read_seconds"] *= args.samples / some
        with gzip.open(one) as file:
            found["record_bytes"] = len(file.read()) / min(PART_RECORDS, args.samples)
        found |= {
            "samples": args.samples,
            "shards": num_shards,
            "index_mb": (folder / INDEX_FILE).stat().st_size / 1e6,
            "records_mb": (folder / RECORDS_FILE).stat().st_size / 1e6,
            "requests_get_head": 2 * args.samples,
            "requests_put": num_shards + 2,
        }
    growing = [key for key in found if key != "record_bytes"]
    factor = TARGET / args.samples
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))
    print(json.dumps({f"extrapolated_{name}": round(found[name] * factor, 1) for name in growing}))


if __name__ == "__main__":
    main()
