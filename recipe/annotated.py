"""Annotated pictures for predicting and judging, in the forms that `convert/` reads and writes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.coco import find as find_coco
from convert.coco import read_instances
from convert.items import Rejected
from convert.jsonl import find as find_jsonl
from convert.records import FileRecord
from convert.target import REJECTED_FILE
from recipe.data.index import INDEX_FILE
from recipe.data.storage import CheckedDataset, open_streams
from recipe.schema import Sample


def read_annotated_folder(folder: Path) -> list[Sample]:
    """The annotated pictures of a folder: MDS shards, or one file of JSON lines and the pictures it names.

    Raises:
        ValueError: It is neither, or a picture of it cannot be used or is not annotated.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give one of MDS shards, or of pictures and their annotations")
    if (folder / INDEX_FILE).is_file():
        samples = list(read_mds(folder))
    else:
        files = sorted(file for file in folder.glob("*.jsonl") if file.name != REJECTED_FILE)
        if len(files) != 1:
            splits = sorted(str(index.parent) for index in folder.glob(f"*/{INDEX_FILE}"))
            form = "give a folder of MDS shards, or of pictures and their annotations as convert/jsonl.py reads them"
            remedy = f"give one of its splits, such as {splits[0]}" if splits else form
            raise ValueError(f"{folder} holds neither {INDEX_FILE} nor one file *.jsonl ({len(files)} found): {remedy}")
        samples = _read_jsonl(files[0])
    if not samples:
        raise ValueError(f"{folder} holds no annotated picture")
    unusable = [sample.id for sample in samples if sample.objects is None or not sample.image]
    if unusable:
        raise ValueError(f"{folder} holds samples that are no annotated pictures: {unusable[:5]}")
    return samples


def read_mds(folder: Path, split: str | None = None) -> Iterator[Sample]:
    """All samples of a converted data set, in stored order.

    Raises:
        ValueError: It is none, or damaged.
    """
    rows = CheckedDataset(streams=open_streams({"annotated": {"local": str(folder), "split": split}}), batch_size=1)
    for index in range(rows.num_samples):
        yield Sample.from_mds(rows[index])


def read_coco(path: Path) -> dict[str, Sample]:
    """The samples of a COCO instances file by their `file_name`, without their pictures.

    Raises:
        ValueError: It is no such file, or an entry of it cannot be read.
    """
    samples: dict[str, Sample] = {}
    for entry in find_coco(_instances(path), path.parent, source=path.name).entries:
        assert isinstance(entry, FileRecord)
        try:
            record = entry.parse()
        except ValueError as error:
            raise ValueError(f"{entry.source}: {error}") from error
        width, height = record.size or (0, 0)
        assert record.image is not None and record.objects is not None
        samples[record.image] = Sample(entry.id, b"", int(width), int(height), tuple(record.objects))
    return samples


def read_image_ids(path: Path) -> dict[str, int | str]:
    """The `id` of every image of a COCO instances file, by `file_name`.

    Raises:
        ValueError: It is no such file.
    """
    try:
        return {image["file_name"]: image["id"] for image in _instances(path)["images"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} holds an image without id or file_name") from error


def _instances(path: Path) -> dict[str, list[Any]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a COCO instances file")
    return read_instances(path)


def _read_jsonl(path: Path) -> list[Sample]:
    samples: list[Sample] = []
    found = find_jsonl(path, path.parent)
    for item in (item for entry in found.entries for item in entry.read()):
        if isinstance(item, Rejected):
            raise ValueError(f"{item.source}: {item.reason}: {item.detail}")
        if isinstance(item, Sample):
            samples.append(item)
    return samples
