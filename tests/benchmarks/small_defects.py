"""Write a set of small defects in COCO's form, for `convergence.py --real-sets FOLDER`.

    python tests/benchmarks/small_defects.py FOLDER [--num-images 96] [--seed 5]

Images of 640 x 640 pixels show gray textures: noise of three grain sizes and a wave, tinted. On each are two to eight
scratches, pits and rings, 10 to 30 pixels long and wide, lighter or darker than what is below them, and apart from each
other. The largest covers 0.2 % of its image. FOLDER gets `images/` and `instances.json`.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

SIDE = 640  # pixels
NAMES = ("scratch", "pit", "ring")
Place = tuple[int, int, int, int]  # xywh in pixels


def texture(rng: np.random.Generator) -> UInt8[np.ndarray, "640 640 3"]:
    """Return an image without defects."""
    gray = np.full((SIDE, SIDE), rng.uniform(90, 170))
    for grain in (4, 16, 64):
        coarse = Image.fromarray(rng.normal(0, 1, [SIDE // grain + 2] * 2).astype(np.float32))
        gray += np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) * rng.uniform(3, 9)
    gray += rng.normal(0, rng.uniform(2, 6), gray.shape)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    turn, length, height = rng.uniform(0, math.pi), rng.uniform(4, 20), rng.uniform(0, 10)
    gray += height * np.sin((columns * np.cos(turn) + rows * np.sin(turn)) / length)
    return np.clip(gray[..., None] * rng.uniform(0.9, 1.1, 3), 0, 255).astype(np.uint8)


def free_place(rng: np.random.Generator, used: list[Place], is_round: bool) -> Place:
    """Return a place that touches none of those used."""
    while True:
        width, height = (int(side) for side in rng.integers(10, 31, 2))
        height = width if is_round else height
        x, y = (int(rng.integers(2, SIDE - 2 - side)) for side in (width, height))
        if all(x + width < a or a + w < x or y + height < b or b + h < y for a, b, w, h in used):
            return x, y, width, height


def draw_defect(image: Image.Image, rng: np.random.Generator, kind: int, place: Place) -> None:
    """Draw a defect of the kind `NAMES[kind]`."""
    x, y, width, height = place
    step = int(rng.choice([-1, 1]) * rng.integers(35, 70))
    below = np.asarray(image)[y + height // 2, x + width // 2].astype(int)
    colour = tuple(int(value) for value in np.clip(below + step, 0, 255))
    right, bottom = x + width - 1, y + height - 1  # Pillow draws these columns and rows too
    corners, draw = (x, y, right, bottom), ImageDraw.Draw(image)
    if NAMES[kind] == "scratch":
        falls = bool(rng.integers(2))
        draw.line((x, y if falls else bottom, right, bottom if falls else y), colour, int(rng.integers(1, 4)))
    elif NAMES[kind] == "pit":
        draw.ellipse(corners, fill=colour)
    else:
        draw.ellipse(corners, outline=colour, width=int(rng.integers(2, 4)))


def write_set(folder: Path, num_images: int, seed: int) -> int:
    """Write the images and their annotations; return the number of defects."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    annotations: list[dict[str, object]] = []
    for number in range(num_images):
        image, used = Image.fromarray(texture(rng)), list[Place]()
        for _ in range(int(rng.integers(2, 9))):
            kind = int(rng.integers(len(NAMES)))
            used.append(free_place(rng, used, NAMES[kind] != "scratch"))
            draw_defect(image, rng, kind, used[-1])
            box = {"bbox": used[-1], "area": used[-1][2] * used[-1][3], "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": kind + 1, **box})
        image.save(folder / "images" / f"{number:03}.jpg", quality=92)
    images = [{"id": n, "file_name": f"{n:03}.jpg", "width": SIDE, "height": SIDE} for n in range(num_images)]
    categories = [{"id": kind, "name": name} for kind, name in enumerate(NAMES, start=1)]
    form = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(form))
    return len(annotations)


def main() -> None:
    """Write the set and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-images", type=int, default=96)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    num_defects = write_set(args.folder, args.num_images, args.seed)
    print(f"{args.num_images} images with {num_defects} defects in {args.folder}")


if __name__ == "__main__":
    main()
