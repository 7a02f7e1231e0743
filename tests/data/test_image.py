"""Images → patches: the resize rule and the numbers of Hugging Face's processors."""

import itertools
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, Qwen2VLImageProcessor, Qwen2VLImageProcessorFast

from recipe.config import ImageConfig
from recipe.data import image
from recipe.data.image import decode_pixels, image_spec, patchify, resized_size
from recipe.images import open_image
from recipe.schema import ImageSpec

BUDGETS = [(4 * 28 * 28, 1280 * 28 * 28), (56 * 56, 64 * 28 * 28), (300 * 28 * 28, 320 * 28 * 28)]


def fast(**keywords: Any) -> Qwen2VLImageProcessorFast:
    return Qwen2VLImageProcessorFast(**keywords)


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    stream = BytesIO()
    picture.save(stream, "jpeg", **options)
    return stream.getvalue()


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize(("min_pixels", "max_pixels"), BUDGETS)
def test_sizes_equal_the_image_processors_grid(min_pixels: int, max_pixels: int, patch_size: int):
    processor = fast(min_pixels=min_pixels, max_pixels=max_pixels, patch_size=patch_size)
    spec = image_spec(processor, ImageConfig())
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (28, 28), (27, 29), (14, 14), (1000, 8), (9, 900), (43, 42), (42, 70)]
    sizes += [tuple(size) for size in rng.integers(2, 700, (12, 2)).tolist()]
    for width, height in sizes:
        grid = processor(noise(width, height), return_tensors="pt")["image_grid_thw"][0].tolist()
        assert resized_size(width, height, spec) == (grid[2] * patch_size, grid[1] * patch_size), (width, height)
        assert patchify(noise(width, height), spec)[1] == tuple(grid)


@pytest.mark.parametrize("size", [(56, 56), (100, 75), (33, 210), (500, 333)])
def test_normalised_patches_equal_the_fast_processors_bit_for_bit(size: tuple[int, int]):
    # Both limits: with one alone, transformers 4.57 keeps the other of whatever processor was made before.
    processor = fast(min_pixels=56 * 56, max_pixels=100 * 28 * 28)
    spec = image_spec(processor, ImageConfig())
    expected = processor(noise(*size), return_tensors="pt")["pixel_values"]
    patches, _ = patchify(noise(*size), spec)
    mean = torch.tensor(spec.image_mean)[:, None] * (1 / (1 / 255))
    std = torch.tensor(spec.image_std)[:, None] * (1 / (1 / 255))
    normalised = (patches.view(len(patches), 3, -1).float() - mean) / std
    repeated = normalised[:, :, None].expand(-1, -1, processor.temporal_patch_size, -1).reshape(len(patches), -1)
    # Measured: worst difference 0.
    assert torch.equal(repeated, expected)


def test_four_patches_of_a_hand_made_picture_stand_in_merge_order():
    spec = ImageSpec(1, 2, 4, 64, (0.5,) * 3, (0.5,) * 3)
    values = np.arange(8, dtype=np.uint8).reshape(2, 4)
    patches, grid = patchify(Image.fromarray(np.stack([values, values + 100, values + 200], -1)), spec)
    assert grid == (1, 2, 4)
    assert patches[:, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert patches[3].tolist() == [5, 105, 205]
    assert patches.dtype == torch.uint8


def test_bytes_and_pictures_give_the_same_patches(spec: ImageSpec):
    stream = BytesIO()
    noise(90, 70).save(stream, "png")
    assert torch.equal(patchify(stream.getvalue(), spec)[0], patchify(noise(90, 70), spec)[0])


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_jpeg_has_pillows_pixels(mode: str):
    for size, subsampling, progressive in itertools.product([(1, 1), (31, 20), (33, 57)], [0, 1, 2], [False, True]):
        data = jpeg(noise(*size).convert(mode), subsampling=subsampling, progressive=progressive)
        pixels = decode_pixels(data)
        assert pixels.dtype == torch.uint8
        assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(open_image(data))), (size, subsampling, progressive)


def test_a_turned_jpeg_has_pillows_pixels():
    exif = Image.Exif()
    exif[0x112] = 6
    data = jpeg(noise(31, 20), exif=exif)
    assert np.array_equal(decode_pixels(data).permute(1, 2, 0), np.asarray(open_image(data)))


@pytest.mark.parametrize("cut", [0.2, 0.9, 0.999])
def test_a_jpeg_cut_short_is_refused_in_pillows_words(cut: float):
    data = jpeg(noise(90, 70))
    data = data[: int(len(data) * cut)]
    with pytest.raises(ValueError, match="cannot decode") as expected:
        open_image(data)
    with pytest.raises(ValueError, match="cannot decode") as found:
        decode_pixels(data)
    assert str(found.value) == str(expected.value)


def test_a_plain_jpeg_does_without_pillow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(image, "open_image")
    assert decode_pixels(jpeg(noise(90, 70))).shape == (3, 70, 90)


def test_a_strip_is_refused_with_its_size(spec: ImageSpec):
    with pytest.raises(ValueError, match=r"2010 x 10 pixels.*crop"):
        resized_size(2010, 10, spec)
    assert resized_size(2000, 10, spec)[1] == 28


def test_a_huge_picture_is_reduced_to_the_budget(spec: ImageSpec):
    width, height = resized_size(20000, 15000, spec)
    assert width * height <= spec.max_pixels
    assert width / height == pytest.approx(4 / 3, rel=0.05)


@pytest.mark.parametrize(
    "processor",
    [
        Qwen2VLImageProcessor(min_pixels=5000, max_pixels=90000),
        fast(min_pixels=5000, max_pixels=90000),
        fast(size={"shortest_edge": 5000, "longest_edge": 90000}),
    ],
)
def test_both_spellings_of_the_budget_are_read(processor: Qwen2VLImageProcessor | Qwen2VLImageProcessorFast):
    spec = image_spec(processor, ImageConfig())
    assert (spec.min_pixels, spec.max_pixels) == (5000, 90000)
    assert (spec.patch_size, spec.merge_size) == (14, 2)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14}, (3136, 12845056, 14)),
        ({"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16}, (65536, 16777216, 16)),
    ],
    ids=["qwen2_vl and qwen2_5_vl", "qwen3_vl"],
)
def test_budgets_as_published_are_read(tmp_path: Path, content: dict[str, Any], expected: tuple[int, int, int]):
    """In either spelling of preprocessor_config.json, whichever version of transformers reads it."""
    kind = {"image_processor_type": "Qwen2VLImageProcessorFast", "merge_size": 2, "temporal_patch_size": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**kind, **content}))
    fast(min_pixels=1, max_pixels=2)  # in 4.57 one leaves its budget to the next that lacks an end
    spec = image_spec(AutoImageProcessor.from_pretrained(tmp_path, use_fast=True), ImageConfig())
    assert (spec.min_pixels, spec.max_pixels, spec.patch_size) == expected


def test_the_yaml_wins_over_the_processor_one_limit_at_a_time():
    processor = fast(min_pixels=5000, max_pixels=90000)
    assert image_spec(processor, ImageConfig(max_pixels=70000)).max_pixels == 70000
    assert image_spec(processor, ImageConfig(max_pixels=70000)).min_pixels == 5000
    with pytest.raises(ValueError, match=r"image\.min_pixels 5000 is above image\.max_pixels 4000"):
        image_spec(processor, ImageConfig(max_pixels=4000))
