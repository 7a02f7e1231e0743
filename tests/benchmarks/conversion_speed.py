"""Measure images per core-second of a conversion, next to a loop that only decodes the same files.

    python tests/benchmarks/conversion_speed.py [--data SHARED_DATA/coco_cc_train] [--repeats 5]

The folder holds `images` and `instances.json`; each image is taken `--copies` times under other names. A conversion by
`convert.coco` reads annotations and files, decodes every byte of each image, and writes shards with checksums, records
and the index. `verified` is with `convert.verify` afterwards, which checks checksums, rows and sidecar and decodes no
image again. The loop reads each file and decodes it by `open_image`. Times are CPU time of this process and its
workers, in turns, medians. The last line is JSON: images per core-second, `converted_over_decoded` and
`verified_over_decoded`. With `--store` also `fetched`: what the client takes to read the images from an S3 server of
this machine, as a conversion with `--images s3://...` does; the server's own work is not in it.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

from convert import coco
from convert.remote import read_bytes
from convert.verify import verify
from convert.write import convert_split
from recipe.images import open_image
from throughput import DATA

ROOT = Path(__file__).resolve().parents[2]


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def grow(source: Path, folder: Path, copies: int) -> Path:
    """Write a set with every image of another `copies` times."""
    given = json.loads((source / "instances.json").read_bytes())
    (folder / "images").mkdir(parents=True)
    grown = {**given, "images": [], "annotations": []}
    step = 1 + max(row["id"] for rows in (given["images"], given["annotations"]) for row in rows)
    for copy in range(copies):
        for image in given["images"]:
            name = f"{copy}_{Path(image['file_name']).name}"
            shutil.copyfile(source / "images" / image["file_name"], folder / "images" / name)
            grown["images"].append({**image, "id": image["id"] + copy * step, "file_name": name})
        for row in given["annotations"]:
            ids = {"id": row["id"] + copy * step, "image_id": row["image_id"] + copy * step}
            grown["annotations"].append({**row, **ids})
    (folder / "instances.json").write_text(json.dumps(grown))
    return folder


def convert(source: Path, out: Path) -> None:
    """Write the set as `python -m convert.coco` does."""
    found = coco.find(coco.read_instances(source / "instances.json"), source / "images", None, "instances.json")
    convert_split(found, str(out), "train")


def check(out: Path) -> None:
    """Raise RuntimeError if the written set has a problem."""
    if problems := list(verify(out / "train")):
        raise RuntimeError(problems[0])


def decode(source: Path) -> int:
    """Decode all images of the annotations; return how many."""
    names = [image["file_name"] for image in json.loads((source / "instances.json").read_bytes())["images"]]
    for name in names:
        open_image((source / "images" / name).read_bytes())
    return len(names)


def fetch_speed(source: Path, folder: Path) -> float:
    """Return the images per core-second read from a store; the first one, which opens the client, is not counted."""
    sys.path.insert(0, str(ROOT))  # before this script's folder, which has `tests` of its own
    from tests.support.s3_server import s3_server

    with s3_server(folder) as server:
        os.environ.update(server.env)
        address = server.upload(source / "images", "images")
        first, *names = sorted(path.name for path in (source / "images").iterdir())
        read_bytes(f"{address}/{first}")
        start = sum(os.times()[:2])
        for name in names:
            read_bytes(f"{address}/{name}")
        return len(names) / (sum(os.times()[:2]) - start)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "coco_cc_train")
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--store", action="store_true", help="also read the images from an S3 server")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {"decoded": [], "converted": [], "verified": []}
    with tempfile.TemporaryDirectory() as name:
        source, out = grow(args.data, Path(name, "source"), args.copies), Path(name, "out")
        num_images = decode(source)  # reads all files once
        ways: dict[str, Callable[[], object]] = {
            "decoded": lambda: decode(source),
            "converted": lambda: convert(source, out),
            "verified": lambda: check(out),
        }
        for _ in range(args.repeats):
            for way, run in ways.items():
                start = cpu_seconds()
                run()
                seconds[way].append(cpu_seconds() - start)
            shutil.rmtree(out)
        fetched = {}
        if args.store:
            (Path(name) / "server").mkdir()
            fetched = {"fetched": fetch_speed(source, Path(name) / "server")}
    decoded, converted, verified = (median(values) for values in seconds.values())
    rates = {
        "decoded": num_images / decoded,
        "converted": num_images / converted,
        "converted_and_verified": num_images / (converted + verified),
    }
    ratios = {
        "converted_over_decoded": decoded / converted,
        "verified_over_decoded": decoded / (converted + verified),
    }
    print(json.dumps({name: round(value, 3) for name, value in {**rates, **fetched, **ratios}.items()}))


if __name__ == "__main__":
    main()
