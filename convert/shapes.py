"""Synthetic scenes of coloured shapes, each with a caption such as "large red triangle".

    python -m convert.shapes --out OUT --split train --num-samples 2000 --seed 1

Scene `index` of seed `seed` depends on nothing else, so two splits with different seeds share no scene and a longer
run begins with the scenes of a shorter one.
"""

import argparse
import io
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from convert.items import Found
from convert.write import build_parser, run
from recipe.schema import Box, Object, Sample

COLORS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (242, 206, 32),
    "purple": (142, 48, 176),
    "orange": (244, 132, 24),
}
SIZES = {"small": (0.25, 0.32), "large": (0.40, 0.50)}  # side of the shape, as a share of the image's
SHAPES = ("circle", "square", "triangle", "star")
MAX_IOU = 0.1
_OVERSAMPLE = 4  # shapes are drawn this many times larger and reduced, for smooth edges
_PLACES = 100  # tried per shape
_SCENES = 20  # tried per count of shapes


@dataclass(frozen=True)
class _Shape:
    """A placed shape: `mask` (side, side) uint8 coverage, its corner in the image, the tight box around it."""

    mask: np.ndarray
    left: int
    top: int
    box: Box
    color: str
    caption: str


def draw_scene(seed: int, index: int, image_size: int = 140, min_objects: int = 1, max_objects: int = 4) -> Sample:
    """Draw one scene: a PNG, and the tight boxes of its shapes, which overlap by at most `MAX_IOU`.

    `image_size` is in pixels, width and height.

    Raises:
        ValueError: The arguments admit no scene.
    """
    if not 0 <= min_objects <= max_objects or image_size < 28:
        raise ValueError(
            f"min_objects {min_objects}, max_objects {max_objects}, image_size {image_size}: "
            "asks for 0 <= min_objects <= max_objects and image_size >= 28"
        )
    rng = np.random.default_rng([seed, index])
    pixels = _background(rng, image_size)
    count = int(rng.integers(min_objects, max_objects + 1))
    scenes = (_place_shapes(rng, count, image_size) for _ in range(_SCENES))
    shapes = next((shapes for shapes in scenes if shapes is not None), None)
    if shapes is None:
        raise ValueError(f"found no room for {count} shapes in one scene: lower max_objects ({max_objects})")
    for shape in shapes:
        color = np.asarray(COLORS[shape.color]) + rng.uniform(-10, 10, size=3)
        side = len(shape.mask)
        area = pixels[shape.top : shape.top + side, shape.left : shape.left + side]
        area += (color - area) * (shape.mask[..., None] / 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(buffer, format="PNG", compress_level=1)
    objects = tuple(Object(shape.box, shape.caption) for shape in shapes)
    return Sample(f"shapes-{seed}-{index:06d}", buffer.getvalue(), image_size, image_size, objects)


def iter_samples(
    num_samples: int, seed: int, image_size: int = 140, min_objects: int = 1, max_objects: int = 4
) -> Iterator[Sample]:
    """Yield the scenes 0 to `num_samples` - 1 of `seed`; see `draw_scene`."""
    for index in range(num_samples):
        yield draw_scene(seed, index, image_size, min_objects, max_objects)


@dataclass(frozen=True, slots=True)
class Scene:
    """The arguments of `draw_scene`: an `Entry`."""

    seed: int
    index: int
    image_size: int = 140
    min_objects: int = 1
    max_objects: int = 4

    def fingerprint(self) -> str:
        """Return the arguments, which decide everything."""
        return repr(self)

    def origin(self) -> tuple[Sequence[str], bytes]:
        """Return its id and its image, which is drawn for it."""
        sample = draw_scene(*astuple(self))
        return (sample.id,), sample.image

    def read(self) -> Iterator[Sample]:
        """Draw the scene."""
        yield draw_scene(*astuple(self))


def _background(rng: np.random.Generator, image_size: int) -> np.ndarray:
    """(image_size, image_size, 3) float: a gradient between two pale greys, with soft blotches."""
    first, last = rng.uniform(150, 225, size=(2, 1)) + rng.uniform(-10, 10, size=(2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:image_size, 0:image_size] / image_size - 0.5
    share = 0.5 + (x * np.cos(angle) + y * np.sin(angle)) / np.sqrt(2)
    blotches = Image.fromarray(rng.uniform(-8, 8, size=(9, 9)).astype(np.float32))
    texture = np.asarray(blotches.resize((image_size, image_size), Image.Resampling.BICUBIC))
    return first + share[..., None] * (last - first) + texture[..., None]


def _place_shapes(rng: np.random.Generator, count: int, image_size: int) -> list[_Shape] | None:
    """`count` shapes that hardly overlap, or None if one found no place."""
    shapes: list[_Shape] = []
    for _ in range(count):
        for _ in range(_PLACES):
            size, color, name = (values[rng.integers(len(values))] for values in (list(SIZES), list(COLORS), SHAPES))
            side = round(rng.uniform(*SIZES[size]) * image_size)
            left, top = (int(start) for start in rng.integers(0, image_size - side + 1, size=2))
            mask, (x1, y1, x2, y2) = _mask(name, side)
            box = (left + x1, top + y1, left + x2, top + y2)
            if all(_iou(box, other.box) <= MAX_IOU for other in shapes):
                shapes.append(_Shape(mask, left, top, box, color, f"{size} {color} {name}"))
                break
        else:
            return None
    return shapes


def _iou(box: Box, other: Box) -> float:
    (x1, y1, x2, y2), (u1, v1, u2, v2) = box, other
    overlap = max(0.0, min(x2, u2) - max(x1, u1)) * max(0.0, min(y2, v2) - max(y1, v1))
    return overlap / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - overlap)


@cache
def _mask(name: str, side: int) -> tuple[np.ndarray, Box]:
    """(side, side) uint8 coverage, 0 to 255, of a shape that fills its square; the box of the half-covered pixels."""
    scale = side * _OVERSAMPLE
    canvas = Image.new("L", (scale, scale))
    draw = ImageDraw.Draw(canvas)
    if name == "circle":
        draw.ellipse((0, 0, scale - 1, scale - 1), fill=255)
    elif name == "square":
        draw.rectangle((0, 0, scale - 1, scale - 1), fill=255)
    elif name == "triangle":
        draw.polygon([((scale - 1) / 2, 0), (scale - 1, scale - 1), (0, scale - 1)], fill=255)
    else:
        turns = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2, 0.45, 1.0)
        points = np.stack([radii * np.sin(turns), -radii * np.cos(turns)], axis=1)
        points = (points - points.min(axis=0)) / np.ptp(points, axis=0) * (scale - 1)
        draw.polygon([tuple(point) for point in points], fill=255)
    mask = np.asarray(canvas.reduce(_OVERSAMPLE))
    rows, columns = np.nonzero(mask >= 128)
    return mask, (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))


def main() -> None:
    """Run the command line."""
    parser = build_parser("shapes", __doc__)
    parser.add_argument("--num-samples", type=int, required=True, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=140, help="pixels, width and height; default %(default)s")
    parser.add_argument("--min-objects", type=int, default=1)
    parser.add_argument("--max-objects", type=int, default=4)

    def find(args: argparse.Namespace) -> Found:
        options = (args.image_size, args.min_objects, args.max_objects)
        return Found([Scene(args.seed, index, *options) for index in range(args.num_samples)])

    run(parser, find)


if __name__ == "__main__":
    main()
