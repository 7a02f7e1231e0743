"""Clip and scale boxes; elementwise IoU and GIoU. Formats and IoU of all pairs come from `torchvision.ops`."""

import torch
from torch import Tensor
from torchvision.ops import box_convert

SMALLEST_AREA = 1e-7  # keeps IoU finite for boxes without an area


def clip_boxes(boxes: Tensor, width: float | Tensor, height: float | Tensor) -> Tensor:
    """Clip boxes to the image.

    Args:
        boxes: (..., 4) xyxy, pixels.
        width: Of the image, pixels; a tensor broadcastable to (...) if the boxes are of several images.
        height: The same.
    """
    return torch.minimum(boxes.clamp(min=0), _x_y_x_y(boxes, width, height))


def pixels_to_normalized(boxes: Tensor, width: float, height: float) -> Tensor:
    """Return boxes (..., 4) xyxy, pixels, as cxcywh in [0, 1] of an image of `width` x `height`."""
    return box_convert(boxes * _x_y_x_y(boxes, 1 / width, 1 / height), "xyxy", "cxcywh")


def normalized_to_pixels(boxes: Tensor, width: float | Tensor, height: float | Tensor) -> Tensor:
    """Return boxes (..., 4) cxcywh in [0, 1] as xyxy, pixels, clipped to the image; `width` as in `clip_boxes`."""
    return clip_boxes(box_convert(boxes, "cxcywh", "xyxy") * _x_y_x_y(boxes, width, height), width, height)


def elementwise_iou(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and GIoU (Rezatofighi et al. 2019) of each box with its own other, in float32 at least.

    Equals torchvision's `generalized_box_iou_loss` except for the epsilon. That one gathers by masks, which makes a GPU
    wait for the host, and is several times slower on a CPU.

    Args:
        boxes: (..., 4) cxcywh.
        others: (..., 4) cxcywh, broadcastable.

    Returns:
        (...) and (...); finite and differentiable if the boxes are finite.
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
    x, y = (torch.as_tensor(value, dtype=boxes.dtype, device=boxes.device) for value in (x, y))
    return torch.stack([x, y, x, y], dim=-1)


def _corners(boxes: Tensor) -> tuple[Tensor, ...]:
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    return box_convert(boxes, "cxcywh", "xyxy").unbind(-1)
