"""Time whole training steps: packed, padded, and packed with a dense mask; one model, one batch."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoConfig
from transformers.masking_utils import AttentionMaskInterface

from convert.shapes import draw_scene
from recipe.build import build_model
from recipe.config import RecipeConfig
from recipe.data.collate import collate_packed, collate_standard, one_each
from recipe.data.encode import Encoder
from recipe.data.image import image_spec
from recipe.joint import JointModel
from recipe.load import load_processor
from recipe.models.attention import attend_segments, packed_mask
from recipe.optim.groups import build_optimizer
from recipe.schema import Batch, Example, Sample

DENSE = "dense_sdpa"
# (pixels along a side or 0, words): samples of some 400 to 1,550 tokens, images and long chats, two of text alone.
CHATS = ((420, 190), (0, 610), (560, 430), (420, 650), (504, 710), (0, 1130), (560, 930), (420, 1310))
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "a", "truck")


@cache
def block_diagonal(segment_lengths: tuple[int, ...]) -> Tensor:
    """Return (1, 1, L, L) bool: each sample sees its own past. Kept, so that only its use is timed."""
    blocks = [torch.ones(length, length, dtype=torch.bool).tril() for length in segment_lengths]
    return torch.block_diag(*blocks).bool()[None, None]


def dense_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    segment_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over a packed row with a dense mask only; the vision tower is cut up by transformers."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    mask = None if segment_lengths is None else block_diagonal(tuple(segment_lengths))
    attended = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
    return attended.transpose(1, 2), None


def make_sample(index: int, pixels: int, num_words: int) -> Sample:
    """Return a scene with its objects and a chat about it; or a chat alone."""
    text = " ".join(WORDS[word % len(WORDS)] for word in range(num_words))
    chat = ({"role": "user", "content": "Tell me more."}, {"role": "assistant", "content": text})
    if not pixels:
        return Sample(f"text {index}", b"", 0, 0, None, chat)
    return replace(draw_scene(seed=0, index=index, image_size=pixels, min_objects=4, max_objects=6), messages=chat)


def make_examples(config: RecipeConfig) -> list[Example]:
    """Return the batch: one sample for each of `CHATS`."""
    name = config.model.pretrained_model_name_or_path
    processor, hf_config = load_processor(name), AutoConfig.from_pretrained(name)
    spec = image_spec(processor.image_processor, config.image)
    encoder = Encoder(processor.tokenizer, hf_config, spec, config.prompt, 32, config.max_seq_len)
    return [encoder(make_sample(index, *chat)) for index, chat in enumerate(CHATS)]


def padding_waste(examples: Sequence[Example]) -> float:
    """Return the share of padded rows that is padding."""
    lengths = [len(example.input_ids) for example in examples]
    return 1 - sum(lengths) / (len(lengths) * max(lengths))


class Step:
    """A model with its optimizer, and the batch as one of the ways collates it."""

    def __init__(self, config: RecipeConfig, attn_implementation: str, batch: Batch):
        config = replace(config, model=replace(config.model, attn_implementation=attn_implementation))
        torch.manual_seed(0)
        self.model: JointModel = build_model(config, load_processor(config.model.pretrained_model_name_or_path)).train()
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.batch = batch

    def __call__(self) -> float:
        """Run forward, backward and update; return the loss."""
        self.optimizer.zero_grad()
        loss = self.model.loss(self.model(self.batch), self.batch)["total"]
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def window_seconds(
    lengths: Sequence[int], num_heads: int, width: int, repeats: int, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Return core-seconds of attention within windows, forward and backward: by one call per window or per length."""

    def loop(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip(*(states.split(list(lengths)) for states in (query, key, value)), strict=True)
        heads = ([states.transpose(0, 1)[None] for states in part] for part in parts)
        return torch.cat([F.scaled_dot_product_attention(*part)[0].transpose(0, 1) for part in heads])

    ways = {"loop": loop, "grouped": lambda query, key, value: attend_segments(query, key, value, lengths)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            states = [torch.randn(sum(lengths), num_heads, width, dtype=dtype, requires_grad=True) for _ in range(3)]
            start = time.process_time()
            way(*states).sum().backward()
            seconds[name].append(time.process_time() - start)
    return {name: median(values[1:]) for name, values in seconds.items()}


def step_seconds(config: RecipeConfig, examples: Sequence[Example], repeats: int) -> dict[str, float]:
    """Return core-seconds of a step in each way: medians of interleaved repeats, after a checked one that warms up."""
    AttentionInterface.register(DENSE, dense_sdpa)
    AttentionMaskInterface.register(DENSE, packed_mask)
    packed = collate_packed(one_each(examples))
    steps = {
        "packed": Step(config, "auto", packed),
        "padded": Step(config, "auto", collate_standard(one_each(examples), pad_token_id=0)),
        "dense": Step(config, DENSE, packed),
    }
    losses = [step() for step in steps.values()]
    assert max(losses) - min(losses) <= 1e-3 * losses[0], f"three ways to one loss: {losses}"
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return {name: median(values) for name, values in seconds.items()}
