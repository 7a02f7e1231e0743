"""Helpers of the benchmarks: real COCO-form sets as samples, and the true Qwen2.5 tokenizer built offline."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Qwen2TokenizerFast

from recipe.schema import Object, Sample


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


def build_qwen_tokenizer(source: Path, out: Path) -> PreTrainedTokenizerBase:
    """Builds the tokenizer of `source` (`build_qwen25.py` and its vocabulary) into `out`, in some seconds."""
    command = [sys.executable, str(source / "build_qwen25.py"), str(source / "qwen.tiktoken"), str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Qwen2TokenizerFast(tokenizer_file=str(out / "tokenizer.json"))
