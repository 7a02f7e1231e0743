"""Read real COCO-form sets as samples and shards, and build the true Qwen2.5 tokenizer, offline; for the benchmarks."""

import hashlib
import json
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F
from transformers import PreTrainedTokenizerBase, Qwen2TokenizerFast

from convert.coco import find, read_instances
from convert.items import Note, Rejected
from convert.write import write_split
from recipe.data.image import shown_pixels
from recipe.images import open_image
from recipe.metrics.gather import UNDEFINED
from recipe.schema import ImageSpec, Sample
from recipe.tiny import build_tiny_checkpoint

YAML = Path(__file__).resolve().parents[2] / "yamls" / "quickstart.yaml"
TOKEN_SIDE = 28  # pixels
# What the sets of real images change in YAML.
REAL: dict[str, Any] = {
    "image.min_pixels": 80 * TOKEN_SIDE**2,
    "image.max_pixels": 128 * TOKEN_SIDE**2,
    "max_seq_len": 4096,
    "detection_head.num_queries": 60,
    "caption_decoder.max_caption_tokens": "null",
    "detection_head.num_denoising_groups": 2,  # of ten objects and more per image
    "train_loader.global_batch_size": 8,
    "eval_loader.global_batch_size": 8,
}
# What our head learns in addition to boxes; the peers learn captions as classes.
TASKS: dict[str, dict[str, Any]] = {
    "captions": {"loss.weight_caption": 4.0},
    "boxes": {},
}
AUGMENTS = ("auto", "none", "flip", "crop", "parts")
SCORES = {"ap50": "box_ap50", "ap": "box_ap", "ap_small": "box_ap_small"}
SPLIT_SEED = 17
CHOICE_SEED = 0
LEAST_PIXELS, MOST_PIXELS = 128 * TOKEN_SIDE**2, 1280 * TOKEN_SIDE**2  # 100,352 and 1,003,520
SIDE, QUANTILE = 24, 0.25  # of `pixel_budget`
BATCH_SIZE = 8  # at LEAST_PIXELS
LARGE = 2  # times LEAST_PIXELS: larger budgets are trained on parts, if --augment is auto
JPEG_QUALITY = 95  # of images that are stored again


class SetError(ValueError):
    """A folder is not a set of real images; the message says what is missing."""


def find_set(folder: Path) -> tuple[Path, Path]:
    """Return the annotations and the folder of images of a COCO-form set.

    The annotations are `instances.json`, else the only JSON file. Their `file_name`s are looked up in `images`, then in
    the folder itself, where some exporters put the images.

    Raises:
        SetError: One of them is missing.
    """
    if not folder.is_dir():
        raise SetError(f"{folder} is not a folder: give a folder with images and instances.json")
    files = [folder / "instances.json"]
    if not files[0].is_file():
        files = sorted(folder.glob("*.json"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "no JSON file"
            raise SetError(f"{folder} has no instances.json but {names}: name the annotations instances.json")
    try:
        entries = read_instances(files[0])["images"]
    except ValueError as error:
        raise SetError(str(error)) from error
    first = next((row["file_name"] for row in entries if isinstance(row, dict) and row.get("file_name")), None)
    if first is None:
        raise SetError(f"{files[0]} lists no image with a file_name")
    for images in (folder / "images", folder):
        if (images / first).is_file():
            return files[0], images
    raise SetError(f"the first image of {files[0]}, {first!r}, is neither in {folder / 'images'} nor in {folder}")


def read_set(folder: Path) -> tuple[list[Sample], Counter[str]]:
    """Return a set's images with their objects, in the file's order, as conversion reads them, and what was left out.

    Boxes are clipped to their images; degenerate ones, and images that cannot be used, are left out and counted.

    Raises:
        SetError: It is not such a set.
    """
    annotations, images = find_set(folder)
    left_out: Counter[str] = Counter()
    samples: list[Sample] = []
    try:
        found = find(read_instances(annotations), images, source=annotations.name, bbox_type="real", bad_boxes="drop")
    except ValueError as error:
        raise SetError(str(error)) from error
    for item in [*found.leading, *(item for entry in found.entries for item in entry.read())]:
        if isinstance(item, Note):
            left_out[item.what] += item.count
        elif isinstance(item, Rejected):
            left_out[f"left out: {item.reason}"] += 1
        elif item.objects is None:
            left_out["left out: not annotated"] += 1
        else:
            samples.append(replace(item, id=f"{folder.name}/{item.id}"))
    return samples, left_out


def read_samples(folder: Path) -> list[Sample]:
    """Return the images of `read_set`."""
    return read_set(folder)[0]


def fingerprint(folder: Path) -> str:
    """Return 8 hex digits of a set: of its annotations, and the names and sizes of its image files."""
    annotations, images = find_set(folder)
    files = sorted((str(path.relative_to(images)), path.stat().st_size) for path in images.rglob("*") if path.is_file())
    return hashlib.sha256(annotations.read_bytes() + json.dumps(files).encode()).hexdigest()[:8]


def split_off_fifth(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split a set 80/20 by image."""
    shuffled = list(samples)
    random.Random(seed).shuffle(shuffled)
    part = len(shuffled) * 4 // 5
    return shuffled[:part], shuffled[part:]


def split_set(samples: Sequence[Sample], part: str) -> tuple[list[Sample], list[Sample]]:
    """Return what is trained on and what is judged for `part`.

    The fifth for `test` is the same for all seeds of training. For `choice`, of learning rates, a fifth of the rest is
    held out, so that nothing is chosen by an image of the test.
    """
    train, test = split_off_fifth(samples, SPLIT_SEED)
    if part not in ("test", "choice"):
        raise ValueError(f"unknown part {part!r}: test or choice")
    return (train, test) if part == "test" else split_off_fifth(train, CHOICE_SEED)


def pixel_budget(samples: Sequence[Sample]) -> int:
    """Return the most pixels that an image of a set is shown with: one rule for ours and every peer.

    It is the least, in vision tokens of 28 x 28, at which the first quartile of the objects' shorter sides reaches 24
    pixels in the resized images; at least 100,352, and no more than the largest stored image has, nor than 1,003,520.
    """
    objects = [(sample, item.box) for sample in samples for item in sample.objects or () if not item.iscrowd]
    stored = max(math.prod(round(side / TOKEN_SIDE) for side in (s.width, s.height)) for s in samples) * TOKEN_SIDE**2
    most = min(max(stored, LEAST_PIXELS), MOST_PIXELS)
    if not objects:
        return LEAST_PIXELS
    sides = np.array([min(x2 - x1, y2 - y1) for _, (x1, y1, x2, y2) in objects])
    areas = np.array([sample.width * sample.height for sample, _ in objects])
    for pixels in range(LEAST_PIXELS, most, TOKEN_SIDE**2):
        if np.quantile(sides * np.minimum(1, np.sqrt(pixels / areas)), QUANTILE) >= SIDE:
            return pixels
    return most


def augmentation_of(name: str, pixels: int) -> tuple[str, float]:
    """Return the section train_loader.augment, and the share of an image that is shown in training, for everybody.

    `parts` shows a part with about 100,352 of the set's pixel budget, at the scale of the whole image. `auto` is
    `parts` if the budget is more than twice that, else `none`.
    """
    if name == "auto":
        name = "parts" if pixels > LARGE * LEAST_PIXELS else "none"
    share = round(LEAST_PIXELS / pixels, 4) if name == "parts" else 1.0
    part = f"{{probability: 1.0, scale: [{share}, {share}], ratio: [1.0, 1.0], enlarge: false}}"
    sections = {
        "none": "null",
        "flip": "{horizontal_flip: 0.5}",
        "crop": "{horizontal_flip: 0.5, crop: {}}",
        "parts": f"{{horizontal_flip: 0.5, crop: {part}}}",
    }
    return sections[name], share


def batch_size(pixels: float) -> int:
    """Return how many images of `pixels` pixels cost about as much per step as eight of the smallest budget."""
    return max(2, round(BATCH_SIZE * LEAST_PIXELS / pixels))


def pixel_statistics(samples: Sequence[Sample]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, of values in [0, 1], over all images at one small size."""
    thumbnails = torch.stack(
        [F.resize(F.pil_to_tensor(open_image(sample.image)), [96, 128], antialias=True) for sample in samples]
    )
    values = thumbnails.double().div(255).transpose(0, 1).flatten(1)  # (3, pixels)
    return values.mean(1).tolist(), values.std(1).tolist()


def image_spec_of(train: Sequence[Sample], pixels: int, share: float = 1.0) -> ImageSpec:
    """Return the resize rule and the normalisation of the training images, for everybody.

    The least pixels are those of a part, if a share of an image is shown, so that no part is enlarged.
    """
    mean, std = pixel_statistics(train)
    return ImageSpec(
        patch_size=14,
        merge_size=2,
        min_pixels=round(REAL["image.min_pixels"] * share),
        max_pixels=pixels,
        image_mean=tuple(mean),
        image_std=tuple(std),
    )


def shrink(sample: Sample, spec: ImageSpec) -> Sample:
    """Return an image of more than the pixel budget as it is shown whole, so that its parts have the same scale.

    `enlarge: false` keeps the scale of the stored image.
    """
    if sample.width * sample.height <= spec.max_pixels:
        return sample
    pixels, data = shown_pixels(open_image(sample.image), spec), BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(data, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    height, width = pixels.shape[1:]
    x, y = width / sample.width, height / sample.height
    objects = tuple(
        replace(
            item,
            box=(item.box[0] * x, item.box[1] * y, item.box[2] * x, item.box[3] * y),
            area=None if item.area is None else item.area * x * y,
        )
        for item in sample.objects or ()
    )
    return replace(sample, image=data.getvalue(), width=width, height=height, objects=objects)


def result_of(scores: dict[str, float], steps: int, seconds: float) -> dict[str, Any]:
    """Return what a job stores, from the scores of `recipe.metrics.boxes`; None for one that is not defined."""
    values = {name: scores[key] for name, key in SCORES.items()}
    rounded = {name: None if value == UNDEFINED else round(value, 4) for name, value in values.items()}
    return {**rounded, "steps": steps, "cpu_s": round(seconds, 1)}


def make_real_set(source: Path, data: Path, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Return a set split 80/20 by image, and write it to `data/train` and `data/val` unless they are there.

    `data/tiny` becomes a random checkpoint that normalises pixels by the training images' own mean and deviation.
    """
    train, held_out = split_off_fifth(read_samples(source), seed)
    for split, rows in {"train": train, "val": held_out}.items():
        if not (data / split / "index.json").exists():
            write_split(rows, str(data), split)
    if not (data / "tiny").exists():
        mean, std = pixel_statistics(train)
        build_tiny_checkpoint(str(data / "tiny"), image_mean=mean, image_std=std)
    return train, held_out


def build_qwen_tokenizer(source: Path, out: Path) -> PreTrainedTokenizerBase:
    """Build the tokenizer of `source` (`build_qwen25.py` and its vocabulary) into `out`, in some seconds."""
    command = [sys.executable, str(source / "build_qwen25.py"), str(source / "qwen.tiktoken"), str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Qwen2TokenizerFast(tokenizer_file=str(out / "tokenizer.json"))
