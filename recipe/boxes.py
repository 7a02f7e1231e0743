"""Clip, scale and flip boxes. Formats, IoU and GIoU come from `torchvision.ops`."""

import torch
from torch import Tensor
from torchvision.ops import box_convert


def clip_boxes(boxes: Tensor, width: float, height: float) -> Tensor:
    """Cuts boxes to the picture.

    Args:
        boxes: (..., 4) xyxy, pixels.
        width: Of the picture, pixels.
        height: Of the picture, pixels.
    """
    limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)


def scale_boxes(boxes: Tensor, scale_x: float, scale_y: float) -> Tensor:
    """Scales boxes of any format: x and widths by `scale_x`, y and heights by `scale_y`. `boxes`: (..., 4)."""
    return boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])


def flip_boxes(boxes: Tensor, width: float) -> Tensor:
    """Mirrors xyxy boxes (..., 4) left to right in a picture `width` pixels wide."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=-1)


def pixels_to_normalized(boxes: Tensor, width: float, height: float) -> Tensor:
    """(..., 4) xyxy pixels → cxcywh in [0, 1] of a picture of `width` x `height`."""
    return box_convert(scale_boxes(boxes, 1 / width, 1 / height), "xyxy", "cxcywh")


def normalized_to_pixels(boxes: Tensor, width: float, height: float) -> Tensor:
    """(..., 4) cxcywh in [0, 1] → xyxy pixels, cut to the picture. Inverse of `pixels_to_normalized` inside it."""
    return clip_boxes(scale_boxes(box_convert(boxes, "cxcywh", "xyxy"), width, height), width, height)
