"""Helpers of the benchmarks: real COCO-form sets as samples and shards, and the true Qwen2.5 tokenizer, offline."""

import json
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Qwen2TokenizerFast

from convert.write import write_split
from peer_detr import pixel_statistics
from recipe.schema import Object, Sample
from recipe.tiny import build_tiny_checkpoint

# What the sets of real pictures change in yamls/quickstart.yaml.
REAL: dict[str, Any] = {
    "image.min_pixels": 80 * 28**2,
    "image.max_pixels": 128 * 28**2,
    "max_seq_len": 4096,
    "detection_head.num_queries": 60,
    "detection_head.num_denoising_groups": 2,  # of ten objects and more a picture
    "train_loader.global_batch_size": 8,
    "eval_loader.global_batch_size": 8,
}


def read_samples(folder: Path) -> list[Sample]:
    """The pictures of `folder/images` with the objects of `folder/instances.json`, in the file's order."""
    coco = json.loads((folder / "instances.json").read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in coco["categories"]}
    objects: dict[Any, list[Object]] = defaultdict(list)
    for row in coco["annotations"]:
        x, y, width, height = row["bbox"]
        box = (x, y, x + width, y + height)
        objects[row["image_id"]].append(Object(box, names[row["category_id"]], bool(row.get("iscrowd"))))
    return [
        Sample(
            id=f"{folder.name}/{image['id']}",
            image=(folder / "images" / image["file_name"]).read_bytes(),
            width=image["width"],
            height=image["height"],
            objects=tuple(objects[image["id"]]),
        )
        for image in coco["images"]
    ]


def make_real_set(source: Path, data: Path, seed: int) -> tuple[list[Sample], list[Sample]]:
    """A set split 80/20 by picture: as samples, and as `data/train` and `data/val` where they are not there yet.

    `data/tiny` becomes a random checkpoint that normalises pixels as the training pictures ask for.
    """
    samples = read_samples(source)
    random.Random(seed).shuffle(samples)
    part = len(samples) * 4 // 5
    train_part, val_part = samples[:part], samples[part:]
    for split, rows in {"train": train_part, "val": val_part}.items():
        if not (data / split / "index.json").exists():
            write_split(rows, str(data), split)
    if not (data / "tiny").exists():
        mean, std = pixel_statistics(train_part)
        build_tiny_checkpoint(str(data / "tiny"), image_mean=mean, image_std=std)
    return train_part, val_part


def build_qwen_tokenizer(source: Path, out: Path) -> PreTrainedTokenizerBase:
    """Builds the tokenizer of `source` (`build_qwen25.py` and its vocabulary) into `out`, in some seconds."""
    command = [sys.executable, str(source / "build_qwen25.py"), str(source / "qwen.tiktoken"), str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Qwen2TokenizerFast(tokenizer_file=str(out / "tokenizer.json"))
