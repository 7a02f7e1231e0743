"""The feature pyramid: four maps of an image, of cells of half a patch to four patches, for objects of any size.

The vision tower sees patches of 14 x 14 pixels through one linear layer and learns from one token per 28 x 28, which is
coarse for small objects. A few convolutions over the pixels see finer (the spatial prior of ViT-Adapter, Chen et al.
2023, section 3.2); the tower's features before and after its merger join the maps of their cells, and each map
passes what it knows down to the finer one (FPN, Lin et al. 2017).

An image's maps depend on that image alone: images of one size are computed together, those of other sizes apart.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 4
CELLS_PER_TOKEN = 4  # of the finest map, along a side of a vision token
GROUP_SIZE = 8  # channels that are normalised together
PIXELS_PER_CELL = 8  # of the finest map, once the image is resized so that halving three times fits


class ConvNorm(nn.Module):
    """Convolution, group norm (Wu & He 2018), ReLU; maps are (N, rows, columns, channels).

    A cell is made from those below it and one more to each side: 3 x 3 cells, 4 x 4 with a stride of 2. With the usual
    3 x 3 and a stride of 2 a cell looks half a cell to the left and up of its place, and the finest map, after three of
    them, 3.5 of its 8 pixels: small objects were found less often (RESULTS.md, "How exactly boxes are placed").

    Group norm compares a cell with the others of its image. A norm of each cell alone makes empty ones as loud as
    edges: with it the head learned boxes more slowly (RESULTS.md, "Real images").
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, stride + 2, stride, padding=1, bias=False)
        self.group_norm = nn.GroupNorm(math.gcd(out_channels, max(1, out_channels // GROUP_SIZE)), out_channels)

    def forward(self, maps: Float[Tensor, "N rows columns C"]) -> Float[Tensor, "N _ _ channels"]:
        """Return maps with as many rows and columns over the stride, rounded up; no map may have padding."""
        maps = maps.permute(0, 3, 1, 2)
        missing = [-side % stride for side, stride in zip(maps.shape[2:], self.conv.stride, strict=True)]
        if any(missing):
            maps = F.pad(maps, (0, missing[1], 0, missing[0]))
        maps = self.conv(maps)
        # Channels first in memory: else torch's sums over one image depend on how many there are (several threads).
        return F.relu(self.group_norm(maps.contiguous())).permute(0, 2, 3, 1)


class FeaturePyramid(nn.Module):
    """Maps of an image from its pixels and from the vision tower's features before and after the merger.

    Args:
        hidden_size: D, width of the features after the merger.
        patch_width: C, width of those before it.
        width: W, of the maps; a multiple of 8.
    """

    def __init__(self, hidden_size: int, patch_width: int, width: int):
        super().__init__()
        self.width = width
        narrow = width // 2  # of the finest cells, which are the most
        self.stem = nn.Sequential(
            ConvNorm(3, narrow // 4, 2), ConvNorm(narrow // 4, narrow // 2, 2), ConvNorm(narrow // 2, narrow, 2)
        )
        self.to_patches = ConvNorm(narrow, width, 2)
        self.patches = nn.Sequential(nn.LayerNorm(patch_width), nn.Linear(patch_width, width))
        self.to_tokens = ConvNorm(width, width, 2)
        self.tokens = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width))
        self.to_coarse = ConvNorm(width, width, 2)
        self.from_coarse = nn.Linear(width, width)
        self.from_tokens = nn.Linear(width, width)
        self.smooth_patches = ConvNorm(width, width)
        self.from_patches = nn.Linear(width, narrow)
        self.smooth_finest = ConvNorm(narrow, narrow)
        self.widen = nn.Linear(narrow, width)

    def forward(
        self,
        images: Sequence[Float[Tensor, "3 _ _"]],
        tokens: Sequence[Float[Tensor, "_ D"]],
        patches: Sequence[Float[Tensor, "_ _ C"]],
        grid_sizes: Sequence[tuple[int, int]],
    ) -> tuple[list[Float[Tensor, "N _ _ W"]], Float[Tensor, "N levels 2"]]:
        """Return the maps of N images, the finest first and zero beyond an image's own, and its share (x, y) of each.

        Args:
            images: Normalized pixels.
            tokens: N of (tokens, D), raster order.
            patches: N of (tokens, merge², C).
            grid_sizes: (rows, columns) of vision tokens of each image.
        """
        if len(set(grid_sizes)) == 1:  # nothing to pad: no map is copied
            pixels, features, finer = (torch.stack(list(parts)) for parts in (images, tokens, patches))
            levels = self._of_one_size(pixels, features, finer, *grid_sizes[0])
            dtype = torch.promote_types(levels[0].dtype, torch.float32)
            return levels, levels[0].new_ones(len(images), len(levels), 2, dtype=dtype)
        found: list[list[Tensor]] = [[] for _ in images]
        for size, members in members_of(grid_sizes).items():
            pixels, features, finer = (
                torch.stack([parts[place] for place in members]) for parts in (images, tokens, patches)
            )
            levels = self._of_one_size(pixels, features, finer, *size)
            for place, member in enumerate(members):
                found[member] = [level[place] for level in levels]
        levels = [pad_maps(level) for level in zip(*found, strict=True)]
        sizes = torch.tensor([[(level.shape[1], level.shape[0]) for level in own] for own in found])  # (N, levels, 2)
        sizes = sizes.to(levels[0].device, non_blocking=True).to(torch.promote_types(levels[0].dtype, torch.float32))
        return levels, sizes / sizes.amax(0)

    def _of_one_size(self, images: Tensor, tokens: Tensor, patches: Tensor, rows: int, columns: int) -> list[Tensor]:
        """Return the maps of images (N, 3, height, width) with tokens (N, T, D) and patches (N, T, merge², C)."""
        dtype = self.widen.weight.dtype
        side = CELLS_PER_TOKEN * PIXELS_PER_CELL
        # One channel at a time: on a CPU torch's kernel takes three times as long for images of three.
        channels = images.to(dtype).flatten(0, 1)[:, None]
        pixels = F.interpolate(channels, (side * rows, side * columns), mode="bilinear").unflatten(0, (-1, 3))
        finest = self.stem(pixels.squeeze(2).permute(0, 2, 3, 1))
        merge = round(patches.shape[2] ** 0.5)
        grid = self.patches(patches.to(dtype)).view(-1, rows, columns, merge, merge, self.width)
        patch_map = self.to_patches(finest) + grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        token_map = self.to_tokens(patch_map) + self.tokens(tokens.to(dtype)).view(-1, rows, columns, self.width)
        # Contiguous: over other maps the bits of torch's linear layers depend on whether their weights learn.
        coarse = self.to_coarse(token_map).contiguous()
        token_map = (token_map + enlarge(self.from_coarse(coarse), token_map)).contiguous()
        patch_map = self.smooth_patches(patch_map + enlarge(self.from_tokens(token_map), patch_map)).contiguous()
        finest = self.smooth_finest(finest + enlarge(self.from_patches(patch_map), finest)).contiguous()
        return [self.widen(finest), patch_map, token_map, coarse]


def members_of(sizes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """Return the images of each size, in order."""
    return {size: [place for place, own in enumerate(sizes) if own == size] for size in dict.fromkeys(sizes)}


def enlarge(
    maps: Float[Tensor, "N _ _ C"], like: Float[Tensor, "N rows columns _"]
) -> Float[Tensor, "N rows columns C"]:
    """Return maps whose cells are repeated twice along each side, cut to the size of `like`."""
    doubled = maps.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    return doubled[:, : like.shape[1], : like.shape[2]]


def pad_maps(maps: Sequence[Float[Tensor, "_ _ C"]]) -> Float[Tensor, "N rows columns C"]:
    """Return maps of several sizes as one tensor, zero beyond each one's own part."""
    rows, columns = (max(one.shape[axis] for one in maps) for axis in (0, 1))
    return torch.stack([F.pad(one, (0, 0, 0, columns - one.shape[1], 0, rows - one.shape[0])) for one in maps])


def patches_to_image(patches: Float[Tensor, "_ values"], height: int, width: int, merge: int) -> Float[Tensor, "3 _ _"]:
    """Return the pixels of an image of `height` x `width` patches in Qwen2-VL order, 3 * side² values each."""
    side = round((patches.shape[1] // 3) ** 0.5)
    grid = patches.view(height // merge, width // merge, merge, merge, 3, side, side)
    return grid.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height * side, width * side)
