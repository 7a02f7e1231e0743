"""Annotated pictures for predicting and judging, in the forms that `convert/` reads and writes."""

from pathlib import Path
from typing import Any

from convert.coco import find as find_coco
from convert.coco import read_instances
from convert.items import Rejected
from convert.jsonl import find as find_jsonl
from convert.records import FileRecord
from recipe.schema import Sample


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


def read_jsonl(path: Path) -> list[Sample]:
    """Return the samples of a file of JSON lines next to its images.

    Raises:
        ValueError: A record cannot be used.
    """
    samples: list[Sample] = []
    found = find_jsonl(path, path.parent)
    for item in (item for entry in found.entries for item in entry.read()):
        if isinstance(item, Rejected):
            raise ValueError(f"{item.source}: {item.reason}: {item.detail}")
        if isinstance(item, Sample):
            samples.append(item)
    return samples
