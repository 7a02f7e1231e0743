"""The commands of convert/README.md for exports of annotation tools, on hand-made exports of their shape."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import picture, read_rejected, read_samples, rotated_picture, run_main, write_json

from recipe.schema import Object

README = Path(__file__).resolve().parents[2] / "convert/README.md"
ROWS = dict(
    re.findall(r"^\| (Label Studio|CVAT|Roboflow) \|.*`python -m convert\.(coco .*)` \|$", README.read_text(), re.M)
)


def label_studio(folder: Path) -> None:
    """Its numbers begin at 0; a box on an image that the browser turned is on the turned image."""
    (folder / "images").mkdir(parents=True)
    names = ("images/3b8c-a.jpg", "images/77aa-b.jpg")
    (folder / names[0]).write_bytes(picture())
    (folder / names[1]).write_bytes(rotated_picture((10, 20)))
    images = [{"width": 20, "height": 10, "id": number, "file_name": name} for number, name in enumerate(names)]
    annotations = [
        {
            "id": number, "image_id": number, "category_id": number, "segmentation": [],
            "bbox": [1.0, 2.0, 3.5, 4.0], "ignore": 0, "iscrowd": 0, "area": 14.0,
        }
        for number in range(2)
    ]  # fmt: skip
    categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    info = {"year": 2024, "version": "1.0", "description": "", "contributor": "Label Studio", "url": ""}
    content = {"images": images, "categories": categories, "annotations": annotations, "info": info}
    write_json(folder / "result.json", content)


def cvat(folder: Path) -> None:
    (folder / "images/default").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images: list[dict[str, Any]] = []
    for number, name in enumerate(("frame_000000.jpg", "frame_000001.jpg"), start=1):
        (folder / "images/default" / name).write_bytes(picture())
        images.append({"id": number, "width": 20, "height": 10, "file_name": name, "license": 0, "flickr_url": ""})
        images[-1] |= {"coco_url": "", "date_captured": 0}
    attributes = {"occluded": False, "rotation": 0.0}
    annotations = [
        {
            "id": number, "image_id": number, "category_id": number, "segmentation": [], "area": 14.0,
            "bbox": [1.0, 2.0, 3.5, 4.0], "iscrowd": 0, "attributes": attributes,
        }
        for number in (1, 2)
    ]  # fmt: skip
    categories = [{"id": number, "name": name, "supercategory": ""} for number, name in ((1, "cat"), (2, "dog"))]
    content = {"licenses": [{"name": "", "id": 0, "url": ""}], "info": {"year": ""}, "categories": categories}
    write_json(folder / "annotations/instances_default.json", {**content, "images": images, "annotations": annotations})


def roboflow(folder: Path) -> None:
    """The first category is the project's; numbers begin at 0."""
    (folder / "train").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    for number in range(2):
        name = f"a{number}_jpg.rf.0123456789abcdef.jpg"
        (folder / "train" / name).write_bytes(picture())
        images.append({"id": number, "license": 1, "file_name": name, "height": 10, "width": 20})
        images[-1] |= {"date_captured": "2024-01-01T00:00:00+00:00", "extra": {"name": f"a{number}.jpg"}}
    annotations = [
        {
            "id": number, "image_id": number, "category_id": number + 1, "bbox": [1, 2, 3.5, 4], "area": 14,
            "segmentation": [], "iscrowd": 0,
        }
        for number in range(2)
    ]  # fmt: skip
    categories = [{"id": 0, "name": "pets", "supercategory": "none"}]
    categories += [{"id": number, "name": name, "supercategory": "pets"} for number, name in ((1, "cat"), (2, "dog"))]
    content = {"info": {"year": "2024"}, "licenses": [], "categories": categories, "images": images}
    write_json(folder / "train/_annotations.coco.json", {**content, "annotations": annotations})


@pytest.mark.parametrize(("tool", "write"), [("Label Studio", label_studio), ("CVAT", cvat), ("Roboflow", roboflow)])
def test_the_documented_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, write: Any) -> None:
    write(tmp_path / "export")
    command = ROWS[tool].replace("EXPORT", str(tmp_path / "export")).replace("OUT", str(tmp_path / "out"))
    name, *arguments = shlex.split(command)
    run_main(monkeypatch, name, *arguments, "--num-workers", 1)
    assert read_rejected(tmp_path / "out") == []
    samples = read_samples(tmp_path / "out")
    assert [(sample.width, sample.height) for sample in samples] == [(20, 10)] * 2
    area = 14.0
    assert [sample.objects for sample in samples] == [
        (Object((1, 2, 4.5, 6), name, area=area),) for name in ("cat", "dog")
    ]


def test_every_tool_is_there() -> None:
    assert sorted(ROWS) == ["CVAT", "Label Studio", "Roboflow"]
