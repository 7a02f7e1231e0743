"""Write the first training and evaluation sample as the model sees it, decoded, with the role of each segment."""

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist
from transformers import PreTrainedTokenizerBase

from recipe.schema import Batch, Role, Target

log = logging.getLogger(__name__)

_IMAGE_PAD = "<|image_pad|>"
_TAGS = {Role.NONE: "prompt", Role.TEACHER: "teacher answer", Role.STUDENT: "student answer"}


class LogFirstSample(Callback):
    """Writes rank 0's first sample to `folder/first_train_sample.txt` and `folder/first_eval_sample.txt`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: str | Path):
        self.tokenizer = tokenizer
        self.folder = Path(folder)
        self._shown: set[str] = set()

    def batch_start(self, state: State, logger: Logger) -> None:
        """Write the first training sample."""
        self._show("train", state.batch)

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        """Write the first evaluation sample."""
        self._show("eval", state.batch)

    def _show(self, name: str, microbatches: Sequence[Batch]) -> None:
        if name in self._shown or dist.get_global_rank() != 0:
            return
        self._shown.add(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"first_{name}_sample.txt"
        path.write_text(describe_first_sample(microbatches[0], self.tokenizer) + "\n", encoding="utf-8")
        log.info("first %s sample, as the model sees it: %s", name, path)


def describe_first_sample(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the first sample as text: its segments of equal role, image placeholders collapsed, and its target."""
    length = _first_length(batch)
    ids = batch["input_ids"][0, :length].tolist()
    roles = torch.full((length,), int(Role.NONE))
    supervised = batch["label_index"] + 1  # the position of each label in the flattened tokens
    inside = supervised < length
    roles[supervised[inside].cpu()] = batch["label_roles"][inside].cpu()

    grids = iter(batch["image_grid_thw"].tolist())
    parts = [f"sample {batch['samples'][0].id}, {length} tokens"]
    position = 0
    for role, group in groupby(roles.tolist()):
        count = len(list(group))
        text = _decode(ids[position : position + count], tokenizer, grids)
        parts.append(f"[{_TAGS[Role(role)]}, {count} tokens]\n{text}")
        position += count
    if 0 in batch["student_samples"]:
        parts.append(_describe_target(batch["targets"][batch["student_samples"].index(0)], tokenizer))
    return "\n".join(parts)


def _first_length(batch: Batch) -> int:
    if batch["attention_mask"] is not None:
        return int(batch["attention_mask"][0].sum())
    starts = (batch["position_ids"][0, 0] == 0).nonzero()[:, 0].tolist()  # packed: row 0 restarts at every sample
    return starts[1] if len(starts) > 1 else batch["input_ids"].shape[1]


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, grids: Iterator[list[int]]) -> str:
    image_pad = tokenizer.get_vocab()[_IMAGE_PAD]
    texts = []
    for is_image, group in groupby(ids, key=lambda token: token == image_pad):
        tokens = list(group)
        if is_image:
            time, height, width = next(grids)
            merge = math.isqrt(time * height * width // len(tokens))
            texts.append(f"<image {width // merge}x{height // merge}>")
        else:
            texts.append(str(tokenizer.decode(tokens)))
    return "".join(texts)


def _describe_target(target: Target | None, tokenizer: PreTrainedTokenizerBase) -> str:
    if target is None:
        return "[target] not annotated: no detection loss"
    lines = [f"[target] {len(target['boxes'])} objects, boxes as centre and size in 0 to 1"]
    for box, caption_ids in zip(target["boxes"].tolist(), target["caption_ids"], strict=True):
        caption = tokenizer.decode(caption_ids[caption_ids >= 0].tolist(), skip_special_tokens=True)  # -1: padding
        lines.append(f"  ({', '.join(f'{value:.3f}' for value in box)}) {caption}")
    return "\n".join(lines)
