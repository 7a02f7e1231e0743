"""Predictions of images far beyond the pixel budget: of overlapping tiles and of the whole image, merged.

The whole image, reduced to the budget, gives what is larger than a tile; the tiles give what the reduction would make
too small. An object in two tiles, or cut by the edge of one, is found several times: one of these boxes is kept.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from recipe.boxes import elementwise_iou
from recipe.images import uncompressed
from recipe.schema import Box, DetectedObject, Prediction

SAME_OBJECT_IOU = 0.5  # if `evaluation.nms_iou` is not set
CUT_SHARE = 0.02  # of a tile's side: a box that ends closer to the edge of its tile is taken as cut by it
Tile = tuple[int, int, int, int]


def tiles_of(width: int, height: int, side: int, overlap: float) -> list[Tile]:
    """Return the tiles of an image, row by row: xyxy in pixels; none if the image is not larger than one.

    A tile is `side` pixels wide and high, or as the image if that is smaller. It has at least the share `overlap`, in
    [0, 1), of its side in common with the next.
    """
    if max(width, height) <= side:
        return []
    columns, rows = _starts(width, side, overlap), _starts(height, side, overlap)
    return [(x, y, min(x + side, width), min(y + side, height)) for y in rows for x in columns]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    """Return where the tiles along one side begin: evenly spaced, the last one ends where the image does."""
    step = max(1, int(side * (1 - overlap)))
    number = 1 + -(-max(0, length - side) // step)  # rounded up
    return [round(index * (length - side) / max(1, number - 1)) for index in range(number)]


def cut(image: Image.Image, tile: Tile) -> bytes:
    """Return a tile of an RGB image as an image file that costs nothing to write and read."""
    return uncompressed(image.crop(tile))


def merge_tiles(
    whole: Prediction, found: Sequence[tuple[Tile, Prediction]], score_threshold: float, least_score: float, iou: float
) -> Prediction:
    """Return the prediction of an image, with the objects of its tiles.

    Two boxes of different tiles are the same object if they overlap by more than `iou` within the tile of one of them.
    Of these the better one is kept: first those of at least `score_threshold`, as only they have captions, then those
    not cut by the edge of their tile, then by score. Boxes of one tile are left as they are. Objects below
    `least_score` are left out. `found` holds each tile and what was predicted for it, in its own pixels.
    """
    parts = [((0, 0, whole.width, whole.height), whole), *found]
    objects: list[DetectedObject] = []
    source: list[int] = []
    for index, (tile, prediction) in enumerate(parts):
        kept = [item for item in prediction.objects if item.score >= least_score]
        objects += [replace(item, box=_moved(item.box, tile)) for item in kept]
        source += [index] * len(kept)
    if not objects:
        return replace(whole, objects=())
    boxes = torch.tensor([item.box for item in objects], dtype=torch.float64)
    sources = torch.tensor(source)
    tiles = torch.tensor([tile for tile, _ in parts], dtype=torch.float64)[sources]
    is_cut = _is_cut(boxes, tiles, (whole.width, whole.height)).tolist()
    order = sorted(
        range(len(objects)),
        key=lambda index: (objects[index].score < score_threshold, is_cut[index], -objects[index].score),
    )
    chosen = _suppress(boxes, tiles, sources, order, iou)
    return replace(whole, objects=tuple(sorted((objects[index] for index in chosen), key=lambda item: -item.score)))


def _suppress(boxes: Tensor, tiles: Tensor, sources: Tensor, order: Sequence[int], iou: float) -> list[int]:
    """Return the indices that are left if each box in `order` removes the later ones that are the same object."""
    is_left = torch.ones(len(boxes), dtype=torch.bool)
    chosen = []
    for index in order:
        if not is_left[index]:
            continue
        chosen.append(index)
        is_left[index] = False
        others = (is_left & (sources != sources[index])).nonzero()[:, 0]
        box, tile = boxes[index], tiles[index]
        # Of the chosen box, what each other tile shows; of the others, what this tile shows.
        in_theirs = _intersection(box, tiles[others])
        in_ours = _intersection(boxes[others], tile)
        same = torch.maximum(_iou(in_theirs, boxes[others]), _iou(box, in_ours)) > iou
        is_left[others[same]] = False
    return chosen


def _moved(box: Box, tile: Tile) -> Box:
    x1, y1, x2, y2 = box
    return x1 + tile[0], y1 + tile[1], x2 + tile[0], y2 + tile[1]


def _is_cut(boxes: Tensor, tiles: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (K,) bool: whether a box ends at an edge of its tile that is not one of the image."""
    sides = (tiles[:, 2:] - tiles[:, :2]).repeat(1, 2)
    edges = torch.tensor([0, 0, *size], dtype=boxes.dtype)
    return ((boxes - tiles).abs() <= CUT_SHARE * sides).logical_and(tiles != edges).any(dim=1)


def _iou(boxes: Tensor, others: Tensor) -> Tensor:
    return elementwise_iou(box_convert(boxes, "xyxy", "cxcywh"), box_convert(others, "xyxy", "cxcywh"))[0]


def _intersection(boxes: Tensor, tiles: Tensor) -> Tensor:
    """Return xyxy of what two boxes have in common; without an area if they have nothing."""
    low = torch.maximum(boxes[..., :2], tiles[..., :2])
    return torch.cat([low, torch.maximum(low, torch.minimum(boxes[..., 2:], tiles[..., 2:]))], dim=-1)
