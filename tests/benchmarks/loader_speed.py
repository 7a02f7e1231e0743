"""Compare images per core-second of the recipe's encoder and of the Hugging Face processor, to the same tensors."""

import time
from collections.abc import Callable, Sequence
from io import BytesIO
from statistics import median
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoConfig

from recipe.config import RecipeConfig
from recipe.data.encode import Encoder, rope_positions
from recipe.data.image import image_spec
from recipe.load import load_processor
from recipe.models.vlm import PixelNormalizer
from recipe.schema import Sample

Tensors = tuple[Tensor, Tensor, Tensor, Tensor]  # input_ids, position_ids, pixels, image_grid_thw


def encode_here(encoder: Encoder, sample: Sample) -> Tensors:
    """Encode in the recipe's way; pixels stay uint8, and the head's target and the roles are made too."""
    example = encoder(sample)
    return example.input_ids, example.position_ids, example.pixel_patches, example.image_grid_thw


def encode_hugging_face(processor: Any, encoder: Encoder, text: str, sample: Sample) -> Tensors:
    """Encode in the library's way: Pillow, `AutoProcessor` with its fast image processor, `get_rope_index`."""
    with Image.open(BytesIO(sample.image)) as stored:
        image = ImageOps.exif_transpose(stored).convert("RGB")
    batch = processor(text=[text], images=[image], return_tensors="pt")
    grid = batch["image_grid_thw"]
    input_ids = batch["input_ids"][0]
    return input_ids, rope_positions(input_ids, grid, encoder.hf_config), batch["pixel_values"], grid


def check_same(found: Tensors, expected: Tensors, normalizer: PixelNormalizer) -> None:
    """Assert equal numbers: pixels after the normalisation that the recipe leaves to the device, in each frame."""
    assert all(torch.equal(one, other) for one, other in zip(found[:2], expected[:2], strict=True))
    pixels = normalizer(found[2]).view(len(found[2]), 3, 1, -1)
    frames = expected[2].view(len(found[2]), 3, -1, pixels.shape[-1])
    assert torch.equal(pixels.expand_as(frames), frames) and torch.equal(found[3], expected[3])


def seconds_a_call(way: Callable[[Sample], Tensors], samples: Sequence[Sample]) -> float:
    """Return the core-seconds of one sample."""
    start = time.process_time()
    for sample in samples:
        way(sample)
    return (time.process_time() - start) / len(samples)


def loader_rates(config: RecipeConfig, samples: Sequence[Sample], repeats: int) -> tuple[float, float]:
    """Return the images per core-second of (the recipe, Hugging Face), medians of interleaved repeats.

    Raises:
        AssertionError: The tensors of an image differ.
    """
    processor = load_processor(config.model.pretrained_model_name_or_path)
    hf_config = AutoConfig.from_pretrained(config.model.pretrained_model_name_or_path)
    spec = image_spec(processor.image_processor, config.image)
    encoder = Encoder(processor.tokenizer, hf_config, spec, config.prompt, 32, config.max_seq_len)
    normalizer = PixelNormalizer(spec.image_mean, spec.image_std)
    texts = {}
    for sample in samples:
        head, student = encoder.segments(sample)
        texts[sample.id] = "".join(segment.text for segment in head + student)
    ways: list[Callable[[Sample], Tensors]] = [
        lambda sample: encode_here(encoder, sample),
        lambda sample: encode_hugging_face(processor, encoder, texts[sample.id], sample),
    ]
    for sample in samples:
        check_same(ways[0](sample), ways[1](sample), normalizer)
    seconds = [[seconds_a_call(way, samples) for way in ways] for _ in range(repeats)]
    here, there = (median(column) for column in zip(*seconds, strict=True))
    return 1 / here, 1 / there
