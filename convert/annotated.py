"""Annotated images for predicting and judging, in the forms that `convert/` reads and writes.

The only module of `convert/` that `recipe/` imports.
"""

from pathlib import Path

from convert.coco import find as find_coco
from convert.coco import read_instances
from convert.items import Rejected
from convert.jsonl import find as find_jsonl
from convert.records import FileRecord, refuse_fractions
from convert.store import REJECTED_FILE
from recipe.schema import Sample


def read_coco(path: Path) -> dict[str, Sample]:
    """Return the samples of a COCO instances file by their `file_name`, without their images.

    Raises:
        ValueError: It is not such a file, or an entry of it cannot be read.
    """
    samples: dict[str, Sample] = {}
    found = find_coco(read_instances(path), path.parent, source=path.name, bbox_type="real").entries
    entries = [entry for entry in found if isinstance(entry, FileRecord)]
    refuse_fractions(entries, f"write the boxes of {path} in pixels")
    for entry in entries:
        try:
            record = entry.parse()
        except ValueError as error:
            raise ValueError(f"{entry.source}: {error}") from error
        width, height = record.size or (0, 0)
        assert record.image is not None
        objects = None if record.objects is None else tuple(record.objects)
        samples[record.image] = Sample(entry.id, b"", int(width), int(height), objects, None, record.searched)
    return samples


def read_image_ids(path: Path) -> dict[str, int | str]:
    """Return the `id` of every image of a COCO instances file, by `file_name`.

    Raises:
        ValueError: It is not such a file, or its ids and files do not match one to one.
    """
    ids: dict[str, int | str] = {}
    names: dict[str, str] = {}
    for image in read_instances(path, ("images",))["images"]:
        try:
            name, image_id = image["file_name"], image["id"]
            former, owner = ids.setdefault(name, image_id), names.setdefault(str(image_id), name)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} holds an image without id or file_name") from error
        if former != image_id:
            raise ValueError(f"{path} gives {name} the ids {former!r} and {image_id!r}: leave one out")
        if owner != name:
            raise ValueError(f"{path} gives {owner} and {name} the same id {image_id!r}: give each its own")
    return ids


def read_categories(path: Path) -> list[tuple[str, int | str]]:
    """Return name and `id` of the categories of a COCO file; none if it has no such list, as a test split may.

    Raises:
        ValueError: It is not such a file, or a category lacks its name or id.
    """
    try:
        rows = read_instances(path, ("images", "categories"))["categories"]
    except ValueError:
        read_instances(path, ("images",))
        return []
    try:
        return [(row["name"].strip(), row["id"]) for row in rows]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds a category without id or name") from error


def jsonl_files(folder: Path) -> list[Path]:
    """Return the JSON-lines files of annotations in a folder, by name; not a conversion's list of rejected records."""
    return sorted(file for file in folder.glob("*.jsonl") if file.name != REJECTED_FILE)


def read_jsonl(path: Path) -> list[Sample]:
    """Return the samples of a JSON-lines file, with the images that it names.

    Raises:
        ValueError: A line or an image of it cannot be used.
    """
    samples: list[Sample] = []
    # Who names this folder may also read what its links name.
    found = find_jsonl(path, path.parent, bbox_type="real", follow_links=True).entries
    entries = [entry for entry in found if isinstance(entry, FileRecord)]
    refuse_fractions(entries, f'write the boxes of {path} in pixels, or "bbox_type": "norm1" in its records')
    for entry in entries:
        for item in entry.read():
            if isinstance(item, Rejected):
                raise ValueError(f"{item.source}: {item.reason}: {item.detail}")
            if isinstance(item, Sample):
                samples.append(item)
    return samples
