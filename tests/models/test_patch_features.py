"""Vision features before the merger as memory tokens: what the merger reads, each where its pixels are."""

from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2VLImageProcessorFast

from recipe.config import ImageConfig
from recipe.data.image import image_spec, patchify
from recipe.models.memory import Adapter, MemoryBuilder, grid_cells, split_cells
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
    features, patches = vlm.image_features(*encode(pictures, spec), with_patches=True)
    builder = MemoryBuilder(features[0].shape[1], 8, 4, memory_positions=True, patch_width=patches[0].shape[2])
    no_words = torch.zeros(len(pictures), 0, features[0].shape[1])
    grids = [(h // 28, w // 28) for w, h in SIZES]
    memory = builder(features, grids, no_words, torch.ones(len(pictures), 0).bool(), patches)
    first = max(len(part) for part in features)  # the tokens after the merger stand before them
    for row, (picture, found) in enumerate(zip(pictures, patches, strict=True)):
        height, width = picture.shape[:2]
        cells = memory.cells[row, first:][memory.mask[row, first:]] * torch.tensor([width, height, width, height])
        assert torch.allclose(cells[:, 2:], torch.tensor(14.0))
        corners = (cells[:, :2] - 7).round().int().tolist()
        cut = torch.stack([picture[y : y + 14, x : x + 14].permute(2, 0, 1).flatten() for x, y in corners])
        expected = visual.patch_embed(vlm.normalizer(cut).double())
        assert len(set(map(tuple, corners))) == len(corners) == height * width // 14**2
        assert torch.allclose(found.flatten(0, 1), expected, atol=1e-12)


def test_the_patches_of_a_cell_by_hand():
    """The right half of the upper part of a picture, in four: left before right, above before below."""
    found = split_cells(torch.tensor([[0.75, 0.2, 0.5, 0.4]]), 2)
    expected = [[0.625, 0.1], [0.875, 0.1], [0.625, 0.3], [0.875, 0.3]]
    assert torch.allclose(found, torch.tensor([[*center, 0.25, 0.2] for center in expected]))


def test_patches_of_all_cells_are_the_finer_grid():
    found = split_cells(grid_cells(3, 5), 2)
    finer = grid_cells(6, 10)
    order = [int((finer - cell).abs().sum(1).argmin()) for cell in found]
    assert torch.allclose(found, finer[order]) and sorted(order) == list(range(60))


def test_memory_with_patches_by_hand():
    """Tokens, patches, words; each through its own adapter; the second image's patches are padded by themselves."""
    torch.manual_seed(0)
    builder = MemoryBuilder(12, 8, adapter_ratio=4, memory_positions=True, patch_width=6).double()
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (2, 1)]
    patches = [torch.randn(n, 4, 6, generator=generator, dtype=torch.float64) for n in (2, 1)]
    words = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64)
    word_mask = torch.tensor([[True, True, False], [True, True, True]])
    memory = builder(tokens, [(1, 2), (1, 1)], words, word_mask, patches)
    assert memory.mask.int().tolist() == [[1, 1, *[1] * 8, 1, 1, 0], [1, 0, *[1] * 4, *[0] * 4, 1, 1, 1]]
    assert isinstance(builder.patch_adapter, Adapter)
    for row in range(2):
        parts = [builder.vision_adapter(tokens[row]), builder.patch_adapter(patches[row].flatten(0, 1))]
        parts.append(builder.language_adapter(words[row, word_mask[row]]))
        contents = memory.tokens[row, memory.mask[row]] - memory.positions[row, memory.mask[row]]
        assert torch.allclose(contents, torch.cat(parts), atol=1e-12)
    assert not memory.cells[:, 10:].any() and not memory.positions[:, 10:].any()
    assert not memory.cells[~memory.mask].any()


@torch.no_grad()
def test_they_are_not_kept_where_nobody_reads_them(vlm: VisionLanguageModel, tiny_examples: dict[str, Example]):
    batch = collator("packed")([tiny_examples["one"]])
    names = ("input_ids", "attention_mask", "position_ids", "segment_lengths", "pixel_patches", "image_grid_thw")
    arguments = [batch[name] for name in names]
    assert vlm(*arguments).patch_features == ()
    assert len(vlm(*arguments, with_patches=True).patch_features) == len(batch["image_grid_thw"])
