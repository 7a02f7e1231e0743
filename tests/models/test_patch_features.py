"""Vision features before the merger, which the pyramid reads: what the merger reads, each where its pixels are."""

from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2VLImageProcessorFast

from recipe.config import ImageConfig
from recipe.data.image import image_spec, patchify
from recipe.models.vlm import PixelNormalizer, VisionLanguageModel, load_vlm
from recipe.schema import Example, ImageSpec
from tests.support.tiny_cases import EVERY_FAMILY, collator

SIZES = [(3, 5), (9, 5), (2, 2), (5, 11)]  # (width, height) in tokens; windows are 4 wide, so all are cut but one


@pytest.fixture(scope="module")
def spec(tiny_checkpoint: str) -> ImageSpec:
    return image_spec(Qwen2VLImageProcessorFast.from_pretrained(tiny_checkpoint), ImageConfig())


@pytest.fixture
def vlm(tiny_checkpoint: str, spec: ImageSpec) -> VisionLanguageModel:
    normalizer = PixelNormalizer(spec.image_mean, spec.image_std)
    return VisionLanguageModel(load_vlm(tiny_checkpoint, "auto", "float64").eval(), normalizer)


@pytest.fixture(scope="module")
def pictures(spec: ImageSpec) -> list[Tensor]:
    """(height, width, 3) uint8 each, no two patches alike."""
    generator, side = torch.Generator().manual_seed(0), 2 * spec.patch_size
    return [torch.randint(0, 256, (h * side, w * side, 3), generator=generator, dtype=torch.uint8) for w, h in SIZES]


def encode(pictures: Sequence[Tensor], spec: ImageSpec) -> tuple[Tensor, Tensor]:
    """The patches of all, and their grids."""
    patches, grids = zip(*(patchify(Image.fromarray(picture.numpy()), spec) for picture in pictures), strict=True)
    return torch.cat(patches), torch.tensor([list(grid) for grid in grids])


@EVERY_FAMILY
@torch.no_grad()
def test_they_are_what_the_merger_reads(vlm: VisionLanguageModel, pictures: list[Tensor], spec: ImageSpec):
    features, patches, _ = vlm.image_features(*encode(pictures, spec), with_patches=True)
    visual = vlm.hf_model.model.visual
    assert [len(part) for part in patches] == [w * h for w, h in SIZES]
    for merged, before in zip(features, patches, strict=True):
        assert before.shape[1:] == (4, 32)
        # measured: 1.1e-15
        assert float((visual.merger(before.flatten(0, 1)) - merged).abs().max()) <= 1e-12


@EVERY_FAMILY
@torch.no_grad()
def test_together_is_one_at_a_time(vlm: VisionLanguageModel, pictures: list[Tensor], spec: ImageSpec):
    _, together, _ = vlm.image_features(*encode(pictures, spec), with_patches=True)
    for picture, found in zip(pictures, together, strict=True):
        _, (alone,), _ = vlm.image_features(*encode([picture], spec), with_patches=True)
        # measured: 0.0
        assert float((found - alone).abs().max()) <= 1e-12


@EVERY_FAMILY
@torch.no_grad()
def test_each_has_the_cell_of_its_pixels(vlm: VisionLanguageModel, pictures: list[Tensor], spec: ImageSpec):
    """Without the tower's blocks a feature is its own patch's embedding: of the pixels that the cell encloses."""
    side = spec.patch_size
    visual = vlm.hf_model.model.visual
    visual.blocks = nn.ModuleList()
    if hasattr(visual, "pos_embed"):
        visual.pos_embed.weight.zero_()
    _, patches, _ = vlm.image_features(*encode(pictures, spec), with_patches=True)
    for picture, found in zip(pictures, patches, strict=True):
        height, width = picture.shape[:2]
        tokens = [(y, x) for y in range(0, height, 2 * side) for x in range(0, width, 2 * side)]
        corners = [(x + dx, y + dy) for y, x in tokens for dy in (0, side) for dx in (0, side)]
        cut = torch.stack([picture[y : y + side, x : x + side].permute(2, 0, 1).flatten() for x, y in corners])
        expected = visual.patch_embed(vlm.normalizer(cut).double())
        assert len(set(map(tuple, corners))) == len(corners) == height * width // side**2
        assert torch.allclose(found.flatten(0, 1), expected, atol=1e-12)


@torch.no_grad()
def test_they_are_not_kept_where_nobody_reads_them(vlm: VisionLanguageModel, tiny_examples: dict[str, Example]):
    batch = collator("packed")([tiny_examples["one"]])
    names = ("input_ids", "attention_mask", "position_ids", "segment_lengths", "pixel_patches", "image_grid_thw")
    arguments = [batch[name] for name in names]
    assert vlm(*arguments).patch_features == ()
    assert len(vlm(*arguments, with_patches=True).patch_features) == len(batch["image_grid_thw"])
