"""Clip, scale and flip boxes; IoU and GIoU one by one. Formats and IoU of all pairs come from `torchvision.ops`."""

import torch
from torch import Tensor
from torchvision.ops import box_convert

SMALLEST_AREA = 1e-7  # so that boxes without one give a number


def clip_boxes(boxes: Tensor, width: float | Tensor, height: float | Tensor) -> Tensor:
    """Cuts boxes to the picture.

    Args:
        boxes: (..., 4) xyxy, pixels.
        width: Of the picture, pixels; a tensor where the boxes are of several, broadcastable to (...).
        height: Of the picture, pixels, likewise.
    """
    return torch.minimum(boxes.clamp(min=0), _x_y_x_y(boxes, width, height))


def scale_boxes(boxes: Tensor, scale_x: float | Tensor, scale_y: float | Tensor) -> Tensor:
    """Scales boxes of any format: x and widths by `scale_x`, y and heights by `scale_y`. `boxes`: (..., 4)."""
    return boxes * _x_y_x_y(boxes, scale_x, scale_y)


def flip_boxes(boxes: Tensor, width: float) -> Tensor:
    """Mirrors xyxy boxes (..., 4) left to right in a picture `width` pixels wide."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=-1)


def pixels_to_normalized(boxes: Tensor, width: float, height: float) -> Tensor:
    """(..., 4) xyxy pixels → cxcywh in [0, 1] of a picture of `width` x `height`."""
    return box_convert(scale_boxes(boxes, 1 / width, 1 / height), "xyxy", "cxcywh")


def normalized_to_pixels(boxes: Tensor, width: float | Tensor, height: float | Tensor) -> Tensor:
    """(..., 4) cxcywh in [0, 1] → xyxy pixels, cut to the picture. Inverse of `pixels_to_normalized` inside it.

    Width and height: see `clip_boxes`.
    """
    return clip_boxes(scale_boxes(box_convert(boxes, "cxcywh", "xyxy"), width, height), width, height)


def elementwise_iou(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU (Rezatofighi et al. 2019) of each box with its own other.

    What torchvision's `generalized_box_iou_loss` is but for its epsilon. That one gathers by masks, so that each time a
    GPU waits for the host; and on a CPU it takes several times as long. In float32 at least.

    Args:
        boxes: (..., 4) cxcywh.
        others: (..., 4) cxcywh, broadcastable.

    Returns:
        (...) and (...); both finite, and differentiable, where the boxes are finite.
    """
    x1, y1, x2, y2 = _corners(boxes)
    u1, v1, u2, v2 = _corners(others)
    width = torch.minimum(x2, u2) - torch.maximum(x1, u1)
    height = torch.minimum(y2, v2) - torch.maximum(y1, v1)
    overlap = width.clamp(min=0) * height.clamp(min=0)
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - overlap
    hull = (torch.maximum(x2, u2) - torch.minimum(x1, u1)) * (torch.maximum(y2, v2) - torch.minimum(y1, v1))
    iou = overlap / union.clamp(min=SMALLEST_AREA)
    return iou, iou - (hull - union) / hull.clamp(min=SMALLEST_AREA)


def _x_y_x_y(boxes: Tensor, x: float | Tensor, y: float | Tensor) -> Tensor:
    """What is said of x and of y, for the four numbers of a box: (..., 4)."""
    x, y = (torch.as_tensor(value, dtype=boxes.dtype, device=boxes.device) for value in (x, y))
    return torch.stack([x, y, x, y], dim=-1)


def _corners(boxes: Tensor) -> tuple[Tensor, ...]:
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    return box_convert(boxes, "cxcywh", "xyxy").unbind(-1)
