"""Synthetic scenes: a pure function of (seed, index), with boxes that fit what is drawn."""

import io
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_helpers import read_rejected, read_samples, run_main
from PIL import Image
from torchvision.ops import box_iou

from convert.shapes import COLORS, MAX_IOU, SHAPES, SIZES, draw_scene, iter_samples
from recipe.schema import Object, Sample


def pixels(sample: Sample) -> np.ndarray:
    image = Image.open(io.BytesIO(sample.image))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (sample.width, sample.height))
    return np.asarray(image).astype(int)


def test_golden_scene() -> None:
    sample = draw_scene(seed=1, index=8)
    assert sample.id == "shapes-1-000008"
    assert sample.objects == (
        Object((64.0, 18.0, 130.0, 85.0), "large green star"),
        Object((79.0, 79.0, 136.0, 136.0), "large orange circle"),
        Object((12.0, 74.0, 73.0, 137.0), "large red star"),
        Object((16.0, 34.0, 55.0, 73.0), "small orange square"),
    )


def test_scene_depends_on_seed_and_index_alone() -> None:
    scenes = list(iter_samples(6, seed=3))
    assert [draw_scene(3, index) for index in reversed(range(6))] == scenes[::-1]
    assert list(iter_samples(3, seed=3)) == scenes[:3]
    assert len({scene.image for scene in [*scenes, *iter_samples(6, seed=4)]}) == 12


def test_box_fits_the_drawn_shape() -> None:
    """Alone on its pale background, a shape's pixels are those nearer to its colour than to grey."""
    for index in range(60):
        sample = draw_scene(5, index, max_objects=1)
        assert sample.objects is not None
        item = sample.objects[0]
        image = pixels(sample)
        color = np.asarray(COLORS[item.caption.split()[1]])
        background = np.median(image.reshape(-1, 3), axis=0)
        near = np.linalg.norm(image - color, axis=2) < np.linalg.norm(image - background, axis=2)
        rows, columns = np.nonzero(near)
        drawn = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.abs(np.subtract(drawn, item.box)).max() <= 1


@pytest.mark.parametrize("image_size", [56, 140, 301])
def test_boxes_sizes_and_overlaps(image_size: int) -> None:
    counts, captions = set(), set()
    for sample in iter_samples(150, 7, image_size):
        objects = sample.objects or ()
        counts.add(len(objects))
        for item in objects:
            x1, y1, x2, y2 = item.box
            assert 0 <= x1 < x2 <= image_size
            assert 0 <= y1 < y2 <= image_size
            size, color, shape = item.caption.split()
            captions.add((size, color, shape))
            low, high = (share * image_size for share in SIZES[size])
            assert low * 0.9 - 1.5 <= max(x2 - x1, y2 - y1) <= high + 0.5
            assert min(x2 - x1, y2 - y1) > 0.85 * max(x2 - x1, y2 - y1) - 1
        for first, second in combinations(objects, 2):
            # In float32, as the converter compares: an overlap of just MAX_IOU is allowed.
            assert bool(box_iou(torch.tensor([first.box]), torch.tensor([second.box])) <= MAX_IOU)
    assert counts == {1, 2, 3, 4}
    assert {color for _, color, _ in captions} == set(COLORS)
    assert {shape for _, _, shape in captions} == set(SHAPES)
    assert {size for size, _, _ in captions} == set(SIZES)


def test_no_objects_is_known_to_hold_nothing() -> None:
    assert draw_scene(0, 0, min_objects=0, max_objects=0).objects == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_objects": 5, "max_objects": 4}, "min_objects 5"),
        ({"min_objects": -1}, "min_objects -1"),
        ({"image_size": 8}, "image_size 8"),
        ({"min_objects": 60, "max_objects": 60}, "no room for 60 shapes"),
    ],
)
def test_impossible_scenes(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_scene(0, 0, **arguments)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        arguments = ["--out", tmp_path / name, "--split", "eval", "--num-samples", 5, "--seed", 2, "--image-size", 56]
        run_main(monkeypatch, "shapes", *arguments, "--min-objects", 0, "--max-objects", 2)
    assert read_samples(tmp_path / "a", "eval") == [draw_scene(2, index, 56, 0, 2) for index in range(5)]
    assert read_rejected(tmp_path / "a") == []
    shards = [(tmp_path / name / "eval" / "00000" / "shard.00000.mds").read_bytes() for name in "ab"]
    assert shards[0] == shards[1]
