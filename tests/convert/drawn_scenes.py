"""What the round trips of formats share: images with boxes drawn at random, converted and compared."""

from pathlib import Path

import numpy as np
import pytest
from convert_helpers import picture, read_rejected, read_samples, rotated_picture, run_main

from recipe.schema import Object, Sample

NAMES = ("cup", "fire hydrant", "Straße", "red_car")
MOST_ERROR = 0.5  # pixels


def draw_scenes(folder: Path, count: int = 24, seed: int = 3) -> dict[str, tuple[int, int, list[Object]]]:
    """Write images of odd sizes, every third one turned by EXIF, and return (width, height, objects) by their name.

    Sizes are those of the displayed image. Every sixth image holds nothing. Boxes have whole coordinates.
    """
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = {}
    for number in range(count):
        width, height = (int(side) for side in generator.integers(17, 301, 2) | 1)
        name = f"image {number:02d}.jpg"
        turned = number % 3 == 1
        (folder / name).write_bytes(rotated_picture((height, width)) if turned else picture((width, height)))
        objects: list[Object] = []
        for _ in range(0 if number % 6 == 5 else int(generator.integers(1, 7))):
            x1, y1 = int(generator.integers(0, width - 4)), int(generator.integers(0, height - 4))
            x2, y2 = int(generator.integers(x1 + 2, width + 1)), int(generator.integers(y1 + 2, height + 1))
            item = Object((x1, y1, x2, y2), str(generator.choice(NAMES)))
            objects += [item] * (item not in objects)
        scenes[name] = (width, height, objects)
    return scenes


def convert(monkeypatch: pytest.MonkeyPatch, out: Path, name: str, *arguments: object) -> list[Sample]:
    """Convert the split train of `out` and return its samples in order; nothing may be rejected."""
    run_main(monkeypatch, name, *arguments, "--out", out, "--split", "train", "--num-workers", "1")
    assert read_rejected(out) == []
    return read_samples(out)


def assert_same(samples: list[Sample], scenes: dict[str, tuple[int, int, list[Object]]]) -> float:
    """Every image, box and caption came back in order; return the largest error of a box in pixels."""
    worst = 0.0
    assert len(samples) == len(scenes)
    for sample, (width, height, objects) in zip(samples, scenes.values(), strict=True):
        assert (sample.width, sample.height) == (width, height)
        assert [item.caption for item in sample.objects or ()] == [item.caption for item in objects]
        for found, item in zip(sample.objects or (), objects, strict=True):
            worst = max(worst, *(abs(ours - truth) for ours, truth in zip(found.box, item.box, strict=True)))
    assert worst <= MOST_ERROR
    return worst
