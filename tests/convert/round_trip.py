"""Random images and boxes to write in a format, and the check that a conversion gives all of them back."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from convert_helpers import picture, read_samples, rotated_picture, run_main

from recipe.schema import Box, Object, Sample

NEAR = 0.5  # pixels


@dataclass(frozen=True)
class Scene:
    """An image at `path`, a name under the image root; width and height as displayed."""

    path: str
    width: int
    height: int
    objects: tuple[Object, ...]


def draw_scenes(
    root: Path, names: Sequence[str], num_scenes: int = 12, folder: str = "", suffix: str = ".jpg"
) -> list[Scene]:
    """Write images of odd sizes, the second turned by EXIF, the third without objects."""
    draw, scenes = random.Random(7), []
    (root / folder).mkdir(parents=True, exist_ok=True)
    for number in range(1, num_scenes + 1):
        width, height = draw.randint(7, 301), draw.randint(7, 301)
        path = f"{folder}{number:012d}{suffix}"
        (root / path).write_bytes(rotated_picture((height, width)) if number == 2 else picture((width, height)))
        count = 0 if number == 3 else draw.randint(1, 9)
        objects = tuple(Object(_box(draw, width, height), draw.choice(names)) for _ in range(count))
        scenes.append(Scene(path, width, height, objects))
    return scenes


def _box(draw: random.Random, width: int, height: int) -> Box:
    x1, y1 = draw.uniform(0, width - 2), draw.uniform(0, height - 2)
    return x1, y1, draw.uniform(x1 + 1, width), draw.uniform(y1 + 1, height)


def xywh(box: Box) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def convert(monkeypatch: pytest.MonkeyPatch, out: Path, name: str, *arguments: object) -> list[Sample]:
    """What `python -m convert.NAME ARGUMENTS` makes; with `--val-share` it makes the same in two parts."""
    common = (*arguments, "--split", "train", "--num-workers", 1)
    run_main(monkeypatch, name, *common, "--out", out)
    samples, two = read_samples(out), out.with_name(f"{out.name}-divided")
    if len(samples) < 6:
        return samples  # all might be in one
    run_main(monkeypatch, name, *common, "--out", two, "--val-share", 0.5)
    parts = [read_samples(two, split) for split in ("train", "val")]
    assert sorted(parts[0] + parts[1], key=lambda sample: sample.id) == sorted(samples, key=lambda sample: sample.id)
    return samples


def assert_same(samples: Sequence[Sample], scenes: Sequence[Scene]) -> None:
    """Every image, box and caption, in order."""
    assert [(item.width, item.height) for item in samples] == [(item.width, item.height) for item in scenes]
    for sample, scene in zip(samples, scenes, strict=True):
        assert sample.objects is not None
        assert [item.caption for item in sample.objects] == [item.caption for item in scene.objects]
        for found, wanted in zip(sample.objects, scene.objects, strict=True):
            assert found.box == pytest.approx(wanted.box, abs=NEAR)
