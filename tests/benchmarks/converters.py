"""Measure time and memory of reading annotations by format, next to `convert.coco` on the same boxes, on one core.

    python tests/benchmarks/converters.py [--formats lvis ...] [--num-images N] [--num-boxes N] [--repeats N]

It draws a set (by default a tenth of LVIS v1's train part, which has 100,170 images and 1,270,141 boxes) and writes it
in each format. A process of its own finds and parses every record; images are not read. Seconds are those of the
processor; the best of the repeats counts. The last line is JSON, by format: `records boxes rejected mb seconds mb_per_s
boxes_per_s peak_mb times_file mb_times_coco boxes_times_coco`. `times_file` is the peak of memory over what the imports
take, in sizes of the files. The last two are bytes and boxes per second in those of `convert.coco`.
"""

import argparse
import importlib
import json
import pickle
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

NAMES = [f"thing_{number}" for number in range(1203)]
IMAGES, BOXES = 10_017, 127_014
SIZE = 640, 480


class Drawn:
    """A set of `num_boxes` boxes on `num_images` images, the same at every reading.

    A box is (number from 1, image from 1, category from 1, xywh).
    """

    def __init__(self, num_images: int, num_boxes: int):
        self.num_images, self.num_boxes = num_images, num_boxes
        draw = random.Random(0)
        # Some 90 numbers each, which makes LVIS's file as large as the published one.
        self.polygons = [
            [round(draw.uniform(0, SIZE[0]), 2) for _ in range(2 * draw.randint(20, 70))] for _ in range(500)
        ]

    def by_image(self) -> Iterator[list[tuple[int, int, int, list[float]]]]:
        draw, number = random.Random(1), 0
        for image in range(1, self.num_images + 1):
            until, rows = self.num_boxes * image // self.num_images, []
            while number < until:
                number += 1
                x, y = round(draw.uniform(0, 500), 2), round(draw.uniform(0, 400), 2)
                box = [x, y, round(draw.uniform(9, 120), 2), round(draw.uniform(9, 80), 2)]
                rows.append((number, image, draw.randrange(len(NAMES)) + 1, box))
            yield rows


def write_list(file: Any, name: str, rows: Iterable[str]) -> None:
    file.write(f'"{name}": [')
    for position, row in enumerate(rows):
        file.write(("," if position else "") + row)
    file.write("]")


def write_instances(folder: Path, drawn: Drawn, image_fields: Callable[[int], dict[str, Any]]) -> Path:
    """Write COCO's and LVIS's form."""
    polygons = [json.dumps([polygon]) for polygon in drawn.polygons]

    def annotations() -> Iterator[str]:
        for rows in drawn.by_image():
            for number, image, category, box in rows:
                head = {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": 99.5}
                yield f'{json.dumps(head)[:-1]}, "segmentation": {polygons[number % len(polygons)]}}}'

    with (folder / "instances.json").open("w") as file:
        file.write("{")
        images = range(1, drawn.num_images + 1)
        size = {"width": SIZE[0], "height": SIZE[1]}
        write_list(file, "images", (json.dumps({"id": image, **size, **image_fields(image)}) for image in images))
        file.write(",")
        write_list(file, "annotations", annotations())
        file.write(",")
        names = enumerate(NAMES, start=1)
        write_list(file, "categories", (json.dumps({"id": number, "name": name}) for number, name in names))
        file.write("}")
    return folder / "instances.json"


def write_coco(folder: Path, drawn: Drawn) -> Path:
    return write_instances(folder, drawn, lambda image: {"file_name": f"{image:012d}.jpg"})


def write_lvis(folder: Path, drawn: Drawn) -> Path:
    def fields(image: int) -> dict[str, Any]:
        url = f"http://images.cocodataset.org/train2017/{image:012d}.jpg"
        lists = {"neg_category_ids": [image % 1203 + 1, 7], "not_exhaustive_category_ids": [9]}
        return {"coco_url": url, "flickr_url": url, "date_captured": "2013-11-14 11:18:45", "license": 3, **lists}

    return write_instances(folder, drawn, fields)


def find_coco(path: Path) -> Any:
    from convert import coco

    return coco.find(coco.read_instances(path), path.parent)


def find_lvis(path: Path) -> Any:
    from convert import coco, lvis

    return lvis.find(coco.read_instances(path), path.parent)


def write_array(path: Path, rows: Iterable[str]) -> Path:
    with path.open("w") as file:
        file.write("[")
        for position, row in enumerate(rows):
            file.write((",\n" if position else "") + row)
        file.write("]")
    return path


def write_visual_genome(folder: Path, drawn: Drawn) -> Path:
    """Write `region_descriptions.json`: a phrase of some nine words per box."""
    place = {"width": SIZE[0], "height": SIZE[1], "coco_id": None, "flickr_id": None}
    urls = ((image, f"https://cs.stanford.edu/people/rak248/VG_100K/{image}.jpg") for image in range(drawn.num_images))
    data = (json.dumps({"image_id": image + 1, "url": url, **place}) for image, url in urls)
    write_array(folder / "image_data.json", data)

    def entries() -> Iterator[str]:
        for image, rows in enumerate(drawn.by_image(), start=1):
            regions = []
            for number, _, category, (x, y, width, height) in rows:
                row = {"region_id": number, "width": int(width), "height": int(height), "image_id": image}
                phrase = f"the {NAMES[category - 1]} that is on a table next to the window"
                regions.append({**row, "phrase": phrase, "y": int(y), "x": int(x)})
            yield json.dumps({"id": image, "regions": regions})

    return write_array(folder / "region_descriptions.json", entries())


def find_visual_genome(path: Path) -> Any:
    from convert import visual_genome

    return visual_genome.find(path, path.parent, path.with_name("image_data.json"))


def write_refcoco(folder: Path, drawn: Drawn) -> Path:
    """Write a ref for every third box, with three sentences: as many records as boxes."""
    write_coco(folder, drawn)
    refs = []
    for rows in drawn.by_image():
        for number, image, category, _ in rows:
            if number % 3:
                continue
            words = ["left", NAMES[category - 1], "close", "to", "us"]
            ids = [number + place for place in range(3)]
            sentences = [{"tokens": words, "raw": " ".join(words), "sent_id": one, "sent": "left one"} for one in ids]
            refs.append({"ref_id": number, "ann_id": number, "image_id": image, "category_id": category})
            refs[-1] |= {"split": "train", "sentences": sentences, "sent_ids": ids, "file_name": f"{number}.jpg"}
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    return folder / "refs(unc).p"


def find_refcoco(path: Path) -> Any:
    from convert import coco, refcoco

    instances = coco.read_instances(path.with_name("instances.json"), ("images", "annotations"))
    return refcoco.find(refcoco.read_refs(path), instances, path.parent, "train")


def write_parquet(folder: Path, drawn: Drawn) -> Path:
    """Write ten files in row groups of 100, with 20,000 bytes in the place of each image."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    objects = pa.struct([("bbox", pa.list_(pa.list_(pa.float32()))), ("category", pa.list_(pa.int64()))])
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image_id", pa.int64()), ("image", image), ("objects", objects)])
    features = {"objects": {"feature": {"category": {"_type": "ClassLabel", "names": NAMES}}, "_type": "Sequence"}}
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    content, writer, group = random.Random(2).randbytes(2**20), None, []
    target = folder / "data"
    target.mkdir()
    per_file = -(-drawn.num_images // 10)
    for number, rows in enumerate(drawn.by_image()):
        if number % per_file == 0:
            if writer is not None:
                writer.close()
            writer = ParquetWriter(target / f"train-{number // per_file:05d}-of-00010.parquet", schema)
        boxes = {"bbox": [row[3] for row in rows], "category": [row[2] - 1 for row in rows]}
        group.append(
            {
                "image_id": number,
                "image": {"bytes": content[number:][:20_000], "path": f"{number}.jpg"},
                "objects": boxes,
            }
        )
        if len(group) == 100 or (number + 1) % per_file == 0 or number + 1 == drawn.num_images:
            assert writer is not None
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            group = []
    assert writer is not None
    writer.close()
    return target


def find_parquet(path: Path) -> Any:
    from convert import parquet

    return parquet.find(path, path, "train")


def write_lines(path: Path, drawn: Drawn, record: Callable[[str, list[tuple[str, list[float]]]], Any]) -> Path:
    """Write a line per image, which `record` makes of its file's name and (name, xyxy) of its boxes."""
    with path.open("w") as file:
        for image, rows in enumerate(drawn.by_image(), start=1):
            boxes = [
                (NAMES[category - 1], [x, y, x + width, y + height]) for _, _, category, (x, y, width, height) in rows
            ]
            file.write(json.dumps(record(f"{image:012d}.jpg", boxes)) + "\n")
    return path


def write_jsonl(folder: Path, drawn: Drawn) -> Path:
    def record(name: str, boxes: list[tuple[str, list[float]]]) -> Any:
        return {"images": [name], "objects": [{"bbox_2d": box, "desc": text} for text, box in boxes]}

    return write_lines(folder / "train.jsonl", drawn, record)


def write_odvg(folder: Path, drawn: Drawn) -> Path:
    def record(name: str, boxes: list[tuple[str, list[float]]]) -> Any:
        rows = [{"bbox": box, "label": NAMES.index(text), "category": text} for text, box in boxes]
        return {"filename": name, "height": SIZE[1], "width": SIZE[0], "detection": {"instances": rows}}

    return write_lines(folder / "train.jsonl", drawn, record)


def write_chat(folder: Path, drawn: Drawn) -> Path:
    """Write answers of JSON, as Qwen2.5-VL writes boxes."""

    def record(name: str, boxes: list[tuple[str, list[float]]]) -> Any:
        answer = json.dumps([{"bbox_2d": box, "label": text} for text, box in boxes])
        turns = [{"from": "human", "value": "<image>\nFind every object."}, {"from": "gpt", "value": answer}]
        return {"image": name, "conversations": turns}

    return write_lines(folder / "train.jsonl", drawn, record)


def write_yolo(folder: Path, drawn: Drawn) -> Path:
    """Write a label file per image; the images are empty files."""
    for place in ("images", "labels"):
        (folder / place).mkdir()
    for image, rows in enumerate(drawn.by_image(), start=1):
        text = ""
        for _, _, category, (x, y, w, h) in rows:
            values = (x + w / 2) / SIZE[0], (y + h / 2) / SIZE[1], w / SIZE[0], h / SIZE[1]
            text += " ".join([str(category - 1), *(f"{value:.6f}" for value in values)]) + "\n"
        (folder / "labels" / f"{image:012d}.txt").write_text(text)
        (folder / "images" / f"{image:012d}.jpg").touch()
    (folder / "data.yaml").write_text(f"train: images\nnames: {json.dumps(NAMES)}\n")
    return folder / "data.yaml"


def find_lines(name: str, path: Path) -> Any:
    return importlib.import_module(f"convert.{name}").find(path, path.parent)


def find_yolo(path: Path) -> Any:
    from convert import yolo

    return yolo.find(path, "train")


FORMATS: dict[str, tuple[Callable[[Path, Drawn], Path], Callable[[Path], Any]]] = {
    "coco": (write_coco, find_coco),
    "lvis": (write_lvis, find_lvis),
    "visual_genome": (write_visual_genome, find_visual_genome),
    "refcoco": (write_refcoco, find_refcoco),
    "parquet": (write_parquet, find_parquet),
    "jsonl": (write_jsonl, partial(find_lines, "jsonl")),
    "odvg": (write_odvg, partial(find_lines, "odvg")),
    "chat": (write_chat, partial(find_lines, "chat")),
    "yolo": (write_yolo, find_yolo),
}


def size_of(path: Path) -> int:
    """Return the bytes of a file with those next to it, or of all files of a folder."""
    folder = path.parent if path.is_file() else path
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read(name: str, path: Path) -> dict[str, float]:
    """Find and parse all records of a file; in a process of its own, as its peak of memory counts."""
    from convert.items import BadRecord, Rejected
    from convert.records import FileRecord

    importlib.import_module(f"convert.{name}")
    before = peak_mb()
    start = time.process_time()  # other programs may share the cores
    found = FORMATS[name][1](path)
    records, boxes = 0, 0
    rejected = sum(isinstance(item, Rejected) for item in found.leading)
    for entry in found.entries:
        assert isinstance(entry, FileRecord)
        try:
            boxes += len(entry.parse().objects or ())
            records += 1
        except BadRecord:
            rejected += 1
    seconds = time.process_time() - start
    counts = {"records": records, "boxes": boxes, "rejected": rejected}
    return {**counts, "seconds": seconds, "peak_mb": peak_mb(), "own_mb": peak_mb() - before}


def measure(name: str, drawn: Drawn, repeats: int) -> dict[str, float]:
    """Write a set in one format and read it `repeats` times."""
    with tempfile.TemporaryDirectory() as folder:
        path = FORMATS[name][0](Path(folder), drawn)
        mb = size_of(path) / 2**20
        command = [sys.executable, __file__, "--read", name, str(path)]
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(repeats)
        ]
    best = min(runs, key=lambda run: run["seconds"])
    own, seconds = best.pop("own_mb"), best["seconds"]
    return {**best, "mb": mb, "mb_per_s": mb / seconds, "boxes_per_s": best["boxes"] / seconds, "times_file": own / mb}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--num-images", type=int, default=IMAGES)
    parser.add_argument("--num-boxes", type=int, default=BOXES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--read", nargs=2, metavar=("FORMAT", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(args.read[0], Path(args.read[1]))))
        return
    drawn, results = Drawn(args.num_images, args.num_boxes), {}
    print(f"{'format':<16}{'records':>9}{'boxes':>10}{'rejected':>9}{'MB':>8}{'s':>7}{'MB/s':>7}{'boxes/s':>10}"
          f"{'peak MB':>9}{'x file':>7}  x coco: MB/s boxes/s")  # fmt: skip
    for name in dict.fromkeys(["coco", *args.formats]):
        row = results[name] = measure(name, drawn, args.repeats)
        for key in ("mb", "boxes"):
            row[f"{key}_times_coco"] = row[f"{key}_per_s"] / results["coco"][f"{key}_per_s"]
        print(f"{name:<16}{row['records']:>9}{row['boxes']:>10}{row['rejected']:>9}{row['mb']:>8.1f}"
              f"{row['seconds']:>7.2f}{row['mb_per_s']:>7.1f}{row['boxes_per_s']:>10.0f}{row['peak_mb']:>9.0f}"
              f"{row['times_file']:>7.2f}{row['mb_times_coco']:>14.2f}{row['boxes_times_coco']:>8.2f}",
              flush=True)  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
