"""LVIS v0.5 and v1 instances → MDS.

    python -m convert.lvis --annotations lvis_v1_train.json --images DIR --out OUT --split train

As `convert.coco`, with two differences. An image's file is that of its `coco_url`: its last two parts under `--images`
(train2017/000000391895.jpg), or the last alone if `--images` is that folder; without the url its `file_name` is used.
And an image is known only in part: its `neg_category_ids` and `not_exhaustive_category_ids` are stored with its objects
and respected in scoring. A box's caption is the name of its category as written, such as bass_(musical_instrument).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert import coco
from convert.image_files import name_of_url
from convert.items import Found, Note
from convert.remote import input_path
from convert.write import add_box_options, box_options, build_parser, run

_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")


def find(
    instances: Mapping[str, Sequence[Any]],
    images: Path,
    captions: Path | None = None,
    source: str = "instances",
    **boxes: Any,
) -> Found:
    """Return one record per image file, as `convert.coco.find`.

    Raises:
        ValueError: As there; or no image has LVIS's lists of categories.
    """
    entries = instances["images"]
    if entries and not any(isinstance(image, dict) and any(name in image for name in _LISTS) for image in entries):
        raise ValueError(f"{source}: no image has {' or '.join(_LISTS)}, as in LVIS: use python -m convert.coco")
    named = [_with_file(image, images) if isinstance(image, dict) else image for image in entries]
    found = coco.find({**instances, "images": named}, images, captions, source, **boxes)
    annotated = {coco.to_key(item.get("image_id")) for item in instances["annotations"] if isinstance(item, dict)}
    num_empty = sum(isinstance(image, dict) and coco.to_key(image.get("id")) not in annotated for image in entries)
    what = "images without annotations, which were not searched for everything: training takes them for empty"
    notes = [Note(what, num_empty)] if num_empty else []
    return Found(found.entries, [*found.leading, *notes], found.classes)


def _with_file(image: dict[str, Any], root: Path) -> dict[str, Any]:
    """Return the entry of an image with its `file_name` under `root`, and with both of LVIS's lists."""
    name, url = image.get("file_name"), image.get("coco_url")
    if isinstance(url, str) and url.strip():
        name = name_of_url(url, root)
    return {**dict.fromkeys(_LISTS, ()), **image, "file_name": name}


def main() -> None:
    """Run the command line."""
    parser = build_parser("lvis", __doc__)
    parser.add_argument("--annotations", type=input_path, required=True, metavar="FILE", help="the instances file")
    parser.add_argument(
        "--images",
        type=input_path,
        required=True,
        metavar="DIR",
        help="folder with train2017 and val2017, or one of them",
    )
    parser.add_argument(
        "--captions", type=input_path, metavar="FILE", help="phrases by annotation_id, in place of the category's name"
    )
    add_box_options(parser)
    run(
        parser,
        lambda args: find(
            coco.read_instances(args.annotations),
            args.images,
            args.captions,
            args.annotations.name,
            **box_options(args),
        ),
    )


if __name__ == "__main__":
    main()
