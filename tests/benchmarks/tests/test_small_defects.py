"""The set of small defects: what the annotations say is in the images, and a seed gives the same set again."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_iou

from small_defects import NAMES, SIDE, draw_defect, free_place, texture, write_set


def test_annotations_are_of_the_images(tmp_path: Path) -> None:
    num_defects = write_set(tmp_path / "a", 2, seed=3)
    found = json.loads((tmp_path / "a" / "instances.json").read_text())
    assert [image["file_name"] for image in found["images"]] == ["000.jpg", "001.jpg"]
    assert len(found["annotations"]) == num_defects >= 4
    for image in found["images"]:
        assert Image.open(tmp_path / "a" / "images" / image["file_name"]).size == (SIDE, SIDE)
        boxes = torch.tensor([row["bbox"] for row in found["annotations"] if row["image_id"] == image["id"]])
        assert ((boxes[:, 2:] >= 10) & (boxes[:, 2:] <= 30)).all()
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1).float()
        assert (corners >= 0).all() and (corners <= SIDE).all()
        assert torch.equal(box_iou(corners, corners), torch.eye(len(corners)))
    write_set(tmp_path / "b", 2, seed=3)
    assert (tmp_path / "a" / "instances.json").read_bytes() == (tmp_path / "b" / "instances.json").read_bytes()


def test_a_defect_fills_its_box_and_no_more() -> None:
    rng = np.random.default_rng(0)
    for kind in [*range(len(NAMES))] * 5:
        plain = texture(rng)
        image = Image.fromarray(plain)
        x, y, width, height = free_place(rng, [], NAMES[kind] != "scratch")
        draw_defect(image, rng, kind, (x, y, width, height))
        rows, columns = (np.asarray(image) != plain).any(-1).nonzero()
        slack = 1 if NAMES[kind] == "scratch" else 0  # a line's ends are round; measured: 1
        assert abs(columns.min() - x) <= slack and abs(columns.max() + 1 - x - width) <= slack
        assert abs(rows.min() - y) <= slack and abs(rows.max() + 1 - y - height) <= slack
