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
from tests.support.tiny_cases import collator

SIZES = [(84, 140), (252, 140), (56, 56), (140, 308)]  # width, height; windows are 112 wide, so all are cut but one


@pytest.fixture(scope="module")
def spec(tiny_checkpoint: str) -> ImageSpec:
    return image_spec(Qwen2VLImageProcessorFast.from_pretrained(tiny_checkpoint), ImageConfig())


@pytest.fixture
def vlm(tiny_checkpoint: str, spec: ImageSpec) -> VisionLanguageModel:
    normalizer = PixelNormalizer(spec.image_mean, spec.image_std)
    return VisionLanguageModel(load_vlm(tiny_checkpoint, "auto", "float64").eval(), normalizer)


@pytest.fixture(scope="module")
def pictures() -> list[Tensor]:
    """(height, width, 3) uint8 each, no two patches alike."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8) for w, h in SIZES]


def encode(pictures: Sequence[Tensor], spec: ImageSpec) -> tuple[Tensor, Tensor]:
    """The patches of all, and their grids."""
    patches, grids = zip(*(patchify(Image.fromarray(picture.numpy()), spec) for picture in pictures), strict=True)
    return torch.cat(patches), torch.tensor([list(grid) for grid in grids])


@torch.no_grad()
def test_they_are_what_the_merger_reads(vlm: VisionLanguageModel, pictures: list[Tensor], spec: ImageSpec):
    features, patches = vlm.image_features(*encode(pictures, spec), with_patches=True)
    visual = vlm.hf_model.model.visual
    assert [len(part) for part in patches] == [w * h // 28**2 for w, h in SIZES]
    for merged, before in zip(features, patches, strict=True):
        assert before.shape[1:] == (4, visual.config.hidden_size)
        # measured: 1.1e-15
        assert float((visual.merger(before.flatten(0, 1)) - merged).abs().max()) <= 1e-12


@torch.no_grad()
def test_together_is_one_at_a_time(vlm: VisionLanguageModel, pictures: list[Tensor], spec: ImageSpec):
    _, together = vlm.image_features(*encode(pictures, spec), with_patches=True)
    for picture, found in zip(pictures, together, strict=True):
        _, (alone,) = vlm.image_features(*encode([picture], spec), with_patches=True)
        # measured: 0.0
        assert float((found - alone).abs().max()) <= 1e-12


@torch.no_grad()
def test_each_has_the_cell_of_its_pixels(vlm: VisionLanguageModel, pictures: list[Tensor], spec: ImageSpec):
    """Without the tower's blocks a feature is its own patch's embedding: of the pixels that the cell encloses."""
    visual = vlm.hf_model.model.visual
    visual.blocks = nn.ModuleList()
    _, patches = vlm.image_features(*encode(pictures, spec), with_patches=True)
    for picture, found in zip(pictures, patches, strict=True):
        height, width = picture.shape[:2]
        tokens = [(y, x) for y in range(0, height, 28) for x in range(0, width, 28)]
        corners = [(x + dx, y + dy) for y, x in tokens for dy in (0, 14) for dx in (0, 14)]
        cut = torch.stack([picture[y : y + 14, x : x + 14].permute(2, 0, 1).flatten() for x, y in corners])
        expected = visual.patch_embed(vlm.normalizer(cut).double())
        assert len(set(map(tuple, corners))) == len(corners) == height * width // 14**2
        assert torch.allclose(found.flatten(0, 1), expected, atol=1e-12)


@torch.no_grad()
def test_they_are_not_kept_where_nobody_reads_them(vlm: VisionLanguageModel, tiny_examples: dict[str, Example]):
    batch = collator("packed")([tiny_examples["one"]])
    names = ("input_ids", "attention_mask", "position_ids", "segment_lengths", "pixel_patches", "image_grid_thw")
    arguments = [batch[name] for name in names]
    assert vlm(*arguments).patch_features == ()
    assert len(vlm(*arguments, with_patches=True).patch_features) == len(batch["image_grid_thw"])
