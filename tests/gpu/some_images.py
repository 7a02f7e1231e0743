"""Copy the first images of a set in COCO's form, with their annotations: `some_images.py SOURCE OUT NUMBER`."""

import json
import shutil
import sys
from pathlib import Path


def copy_some(source: Path, out: Path, number: int) -> None:
    """Write `out/images` and `out/instances.json` with the first `number` images of the same files in `source`."""
    truth = json.loads((source / "instances.json").read_text(encoding="utf-8"))
    images = truth["images"][:number]
    ids = {image["id"] for image in images}
    rows = [row for row in truth["annotations"] if row["image_id"] in ids]
    (out / "images").mkdir(parents=True)
    for image in images:
        shutil.copyfile(source / "images" / image["file_name"], out / "images" / image["file_name"])
    text = json.dumps({**truth, "images": images, "annotations": rows})
    (out / "instances.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    copy_some(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
