"""The feature pyramid: pixels where they belong, each image as if it were alone; reading it by deformable attention."""

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2VLImageProcessorFast
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from recipe.config import ImageConfig
from recipe.data.image import image_spec, patchify
from recipe.models.layers import DeformableAttention
from recipe.models.pyramid import LEVELS, FeaturePyramid, enlarge, pad_maps, patches_to_image

HIDDEN, TOWER, WIDTH = 12, 6, 16
GRIDS = [(2, 3), (1, 1), (2, 3), (5, 2), (3, 3)]  # rows and columns of tokens, odd and even
Inputs = tuple[list[Tensor], list[Tensor], list[Tensor], list[tuple[int, int]]]


@pytest.fixture
def pyramid() -> FeaturePyramid:
    torch.manual_seed(0)
    return FeaturePyramid(HIDDEN, TOWER, WIDTH).double()


def inputs_of(grids: list[tuple[int, int]]) -> Inputs:
    """Pixels, tokens and patches of each image."""
    images, tokens, patches = [], [], []
    for place, (rows, columns) in enumerate(grids):
        generator = torch.Generator().manual_seed(place)
        images.append(torch.randn(3, 28 * rows, 28 * columns, generator=generator, dtype=torch.float64))
        tokens.append(torch.randn(rows * columns, HIDDEN, generator=generator, dtype=torch.float64))
        patches.append(torch.randn(rows * columns, 4, TOWER, generator=generator, dtype=torch.float64))
    return images, tokens, patches, grids


def sizes_of(rows: int, columns: int) -> list[tuple[int, int]]:
    return [*((n * rows, n * columns) for n in (4, 2, 1)), (-(-rows // 2), -(-columns // 2))]


def test_patches_to_image_by_hand():
    """Patches of one pixel, 2 x 4 of them, in squares of 2 x 2: their first channel counts them."""
    patches = torch.stack([torch.arange(8), torch.arange(8) + 10, torch.arange(8) + 20], dim=1).float()
    expected = torch.tensor([[0.0, 1, 4, 5], [2, 3, 6, 7]])
    assert torch.equal(patches_to_image(patches, 2, 4, 2), torch.stack([expected, expected + 10, expected + 20]))


@pytest.mark.parametrize(("width", "height"), [(28, 28), (84, 140), (252, 56), (140, 308)])
def test_patches_to_image_undoes_patchify(tiny_checkpoint: str, width: int, height: int):
    spec = image_spec(Qwen2VLImageProcessorFast.from_pretrained(tiny_checkpoint), ImageConfig(1, 10**6))
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    patches, (_, rows, columns) = patchify(Image.fromarray(pixels.numpy()), spec)
    assert (rows, columns) == (height // 14, width // 14)
    found = patches_to_image(patches.float(), rows, columns, spec.merge_size)
    assert torch.equal(found, pixels.permute(2, 0, 1).float())


@torch.no_grad()
def test_images_of_several_sizes_are_each_alone(pyramid: FeaturePyramid):
    """Their maps and shares; what is beyond an image is 0."""
    levels, extents = pyramid(*inputs_of(GRIDS))
    assert len(levels) == LEVELS and extents.shape == (len(GRIDS), LEVELS, 2)
    for row, (image, token, patch, grid) in enumerate(zip(*inputs_of(GRIDS), strict=True)):
        alone, whole = pyramid([image], [token], [patch], [grid])
        assert torch.equal(whole, torch.ones(1, LEVELS, 2))
        for level, own, (rows, columns), share in zip(levels, alone, sizes_of(*grid), extents[row], strict=True):
            assert own.shape == (1, rows, columns, WIDTH)
            # measured: 1.3e-15
            assert float((level[row, :rows, :columns] - own[0]).abs().max()) <= 1e-12
            rest = level[row].clone()
            rest[:rows, :columns] = 0
            assert not rest.any()
            assert (share * torch.tensor([level.shape[2], level.shape[1]])).round().tolist() == [columns, rows]


@torch.no_grad()
@pytest.mark.parametrize("changed", range(len(GRIDS)))
def test_an_image_changes_no_other_ones_maps(pyramid: FeaturePyramid, changed: int):
    before, _ = pyramid(*inputs_of(GRIDS))
    for part in range(3):
        *inputs, grids = inputs_of(GRIDS)
        inputs[part][changed] = -inputs[part][changed]
        after, _ = pyramid(*inputs, grids)
        for level, (old, new) in enumerate(zip(before, after, strict=True)):
            differs = (old != new).flatten(1).any(1)
            assert differs.tolist() == [row == changed for row in range(len(GRIDS))], (part, level)


@torch.no_grad()
def test_what_a_map_knows_is_where_it_was_seen(pyramid: FeaturePyramid):
    """A change of the left upper corner's pixels is seen there; group norm lets little of it into the rest."""
    inputs = inputs_of([(2, 16)])
    before, _ = pyramid(*inputs)
    inputs[0][0][:, :28, :28] += 1
    after, _ = pyramid(*inputs)
    for old, new in zip(before, after, strict=True):
        change = (new - old)[0].abs().amax(-1).amax(0)
        assert change.argmax() < len(change) / 4
        assert change[len(change) // 2 + 1 :].max() < 0.2 * change.max()


@torch.no_grad()
@pytest.mark.parametrize("side", [1, 2])
def test_a_mirrored_image_has_mirrored_maps(pyramid: FeaturePyramid, side: int):
    """With mirrored kernels: a cell looks around its own middle. Kernels of 3 with a stride of 2 do not."""
    for module in pyramid.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_((module.weight + module.weight.flip(side + 1)) / 2)
    rows, columns = 2, 4
    images, tokens, patches, grids = inputs_of([(rows, columns)])
    grid = patches[0].view(rows, columns, 2, 2, TOWER).flip(side - 1, side + 1)
    mirrored = (
        [images[0].flip(side)],
        [tokens[0].view(rows, columns, HIDDEN).flip(side - 1).flatten(0, 1)],
        [grid.flatten(2, 3).flatten(0, 1)],
        grids,
    )
    for there, back in zip(pyramid(images, tokens, patches, grids)[0], pyramid(*mirrored)[0], strict=True):
        # measured: 3.8e-15
        assert float((there - back.flip(side)).abs().max()) <= 2e-14


def test_maps_are_enlarged_and_padded_by_hand():
    maps = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])[None]
    found = enlarge(maps, torch.zeros(1, 3, 4, 9))
    assert found[0, :, :, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4]]
    padded = pad_maps([maps[0], torch.ones(1, 3, 1)])
    assert padded[..., 0].tolist() == [[[1, 2, 0], [3, 4, 0]], [[1, 1, 1], [0, 0, 0]]]


def test_places_are_float32_under_autocast():
    """The maps are bfloat16; where they are is not.

    Without the image of one token: on a CPU the weight gradient of torch's (2.7.0) bfloat16 convolution of stride 2
    over a single column holds what was in memory before, also NaN.
    """
    grids = [grid for grid in GRIDS if grid != (1, 1)]
    torch.manual_seed(0)
    pyramid, look = FeaturePyramid(HIDDEN, TOWER, WIDTH), DeformableAttention(WIDTH, 2, LEVELS, 2)
    inputs = [[part.float() for part in parts] for parts in inputs_of(grids)[:3]]
    with torch.autocast("cpu", torch.bfloat16):
        levels, extents = pyramid(*inputs, grids)
        read = look(torch.randn(len(grids), 3, WIDTH), torch.rand(len(grids), 3, 4), levels, extents)
    expected = torch.tensor([[(columns / 12, rows / 20) for rows, columns in [sizes_of(*grid)[0]]] for grid in grids])
    assert extents.dtype == torch.float32 and torch.equal(extents[:, :1], expected)
    assert all(level.isfinite().all() for level in levels) and bool(read.isfinite().all())
    read.sum().backward()
    wrong = [name for name, p in pyramid.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not wrong


def make_look(num_heads: int, num_points: int) -> DeformableAttention:
    torch.manual_seed(0)
    look = DeformableAttention(WIDTH, num_heads, LEVELS, num_points).double()
    with torch.no_grad():
        for parameter in look.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return look


def make_maps(num_images: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((8, 12), (4, 6), (2, 3), (1, 2))
    return [torch.randn(num_images, *size, WIDTH, generator=generator, dtype=torch.float64) for size in sizes]


@torch.no_grad()
def test_a_look_by_hand():
    """One head, level and point, half a half box to the right of the centre: the mean of two of four cells."""
    look = DeformableAttention(1, 1, 1, 1).double()
    for layer in (look.value, look.out):
        nn.init.ones_(layer.weight)
    nn.init.zeros_(look.out.bias)
    assert look.offsets.bias.tolist() == [0.5, 0.0]
    maps = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64).view(1, 1, 4, 1)
    states = torch.zeros(1, 3, 1, dtype=torch.float64)
    # At 0.5, between the cells 2 and 4; at 0.125, in cell 1; at 1.125, outside by half a cell: nothing.
    boxes = torch.tensor([[[0.4, 0.5, 0.4, 1.0], [0.125, 0.5, 0.0, 1.0], [1.0, 0.5, 0.5, 1.0]]], dtype=torch.float64)
    found = look(states, boxes, [maps], torch.ones(1, 1, 2, dtype=torch.float64))
    assert found[0, :, 0].tolist() == pytest.approx([3.0, 1.0, 0.0])
    # The image is the left half of the map.
    found = look(states, boxes, [maps], torch.tensor([[[0.5, 1.0]]], dtype=torch.float64))
    assert found[0, 0, 0].tolist() == pytest.approx(1.5)


@torch.no_grad()
def test_a_look_has_the_same_bits_whether_its_weights_learn_or_not():
    """Linear layers of torch have not, over inputs that are not contiguous; averages of the head never learn."""
    torch.manual_seed(0)
    look = DeformableAttention(32, 4, LEVELS, 4)
    levels = [torch.randn(2, side, side, 32) for side in (8, 4, 2, 1)]
    states, boxes, extents = torch.randn(2, 5, 32), torch.rand(2, 5, 4), torch.ones(2, LEVELS, 2)
    learning = look(states, boxes, levels, extents)
    assert torch.equal(look.requires_grad_(False)(states, boxes, levels, extents), learning)


@torch.no_grad()
def test_parity_with_transformers():
    """Its kernel, given our values, places and weights; unpadded maps."""
    num_heads, num_points, look, levels = 4, 3, make_look(4, 3), make_maps(2)
    states, boxes = torch.randn(2, 5, WIDTH).double(), torch.rand(2, 5, 4).double()
    found = look(states, boxes, levels, torch.ones(2, LEVELS, 2).double())
    values = torch.cat([look.value(level).flatten(1, 2) for level in levels], dim=1).unflatten(-1, (num_heads, -1))
    offsets = look.offsets(states).unflatten(-1, (num_heads, LEVELS, num_points, 2))
    places = boxes[:, :, None, None, None, :2] + offsets * boxes[:, :, None, None, None, 2:] / 2
    weights = look.weights(states).unflatten(-1, (num_heads, -1)).softmax(-1).unflatten(-1, (LEVELS, num_points))
    sizes = [(level.shape[1], level.shape[2]) for level in levels]
    starts = torch.tensor([0, *(rows * columns for rows, columns in sizes)]).cumsum(0)[:-1]
    theirs = MultiScaleDeformableAttention()(values, torch.tensor(sizes), sizes, starts, places, weights, 64)
    # measured: 2.2e-16
    assert float((found - look.out(theirs)).abs().max()) <= 1e-12


@torch.no_grad()
def test_a_look_at_padded_maps_is_one_at_the_image_alone():
    look, alone = make_look(2, 4), make_maps(1)
    states, boxes = torch.randn(1, 40, WIDTH).double(), torch.rand(1, 40, 4).double()  # many reach beyond the image
    expected = look(states, boxes, alone, torch.ones(1, LEVELS, 2).double())
    padded = [nn.functional.pad(level, (0, 0, 0, 3, 0, 5)) for level in alone]
    sizes = [(level.shape[2], level.shape[1]) for level in alone]
    shares = [(columns / (columns + 3), rows / (rows + 5)) for columns, rows in sizes]
    extents = torch.tensor([shares], dtype=torch.float64)
    # measured: 5.6e-16
    assert float((look(states, boxes, padded, extents) - expected).abs().max()) <= 1e-12


def test_gradients_of_a_look():
    """By differences, in float64; of states, boxes, maps."""
    look, levels = make_look(2, 2), [level[:, :2, :2].requires_grad_() for level in make_maps(1)]
    states, boxes = torch.randn(1, 2, WIDTH).double().requires_grad_(), torch.rand(1, 2, 4).double().requires_grad_()
    extents = torch.ones(1, LEVELS, 2).double()
    assert torch.autograd.gradcheck(lambda s, b, *maps: look(s, b, maps, extents), (states, boxes, *levels))
