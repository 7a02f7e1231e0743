"""Boxes: their form in an answer's text, clipping, scaling, elementwise IoU and GIoU.

Other formats and the IoU of all pairs come from `torchvision.ops`.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

from recipe.schema import DetectedObject, Object, Sample

NORMALIZED_FRAME = (1000, 1000)
# `recipe.data.chat` reads boxes from a JSON object with this key, or from an empty list.
_TEXT_OF_BOXES = re.compile(r'"bbox_2d"\s*:|\[\s*\]')
SMALLEST_AREA = 1e-7  # keeps IoU finite for boxes without an area
LARGEST_GROWTH = 7.0  # of a side by one delta, as a logarithm: a factor of 1,097


def answer_frame(box_coordinates: str, resized_size: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) that an answer's integers span, given that of the resized image."""
    if box_coordinates == "absolute":
        return resized_size
    if box_coordinates == "normalized_1000":
        return NORMALIZED_FRAME
    raise ValueError(f"prompt.box_coordinates is {box_coordinates!r}: write absolute or normalized_1000")


def box_to_frame(box: Sequence[float], image_size: tuple[int, int], frame_size: tuple[int, int]) -> list[int]:
    """Return an answer's four integers for a box xyxy in pixels; for the sizes see `objects_to_text`."""
    limits = zip(box, image_size * 2, frame_size * 2, strict=True)
    return [min(max(round(value * frame / size), 0), frame) for value, size, frame in limits]


def objects_to_text(objects: Iterable[Object], image_size: tuple[int, int], frame_size: tuple[int, int]) -> str:
    """Return the answer to "detect": a JSON list, top to bottom then left to right, without crowd regions.

    Args:
        objects: Boxes xyxy in pixels of the displayed image.
        image_size: (width, height) of the displayed image.
        frame_size: (width, height) from `answer_frame`.
    """
    rows = [(box_to_frame(item.box, image_size, frame_size), item.caption) for item in objects if not item.iscrowd]
    rows.sort(key=lambda row: (row[0][1], row[0][0]))
    return json.dumps([{"bbox_2d": box, "label": caption} for box, caption in rows], ensure_ascii=False)


def asks_for_boxes(sample: Sample) -> bool:
    """Return whether the chat's first answer, which evaluation generates, is boxes; True if it has no answer."""
    answer = next((turn["content"] for turn in sample.messages or () if turn["role"] == "assistant"), None)
    if answer is None:
        return True
    text = answer if isinstance(answer, str) else "".join(part.get("text", "") for part in answer)
    return _TEXT_OF_BOXES.search(text) is not None


def text_to_objects(text: str, image_size: tuple[int, int], frame_size: tuple[int, int]) -> list[DetectedObject] | None:
    """Parse an answer: the inverse of `objects_to_text`, up to the rounding to integers; all scores are 1.

    Tolerates a code fence, text around the list and a truncated last element. Leaves out elements that are not boxes.

    Returns:
        None if the text has no list, or a list without any box.
    """
    elements = _json_elements(text)
    found = (_detected(element, image_size, frame_size) for element in elements or ())
    objects = [item for item in found if item is not None]
    return objects if objects or elements == [] else None


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
    """Return boxes (..., 4) cxcywh, relative to the image, as xyxy, pixels, clipped; `width` as in `clip_boxes`."""
    return clip_boxes(box_convert(boxes, "cxcywh", "xyxy") * _x_y_x_y(boxes, width, height), width, height)


def apply_deltas(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Return boxes moved in units of their own sides (R-CNN, Girshick et al. 2014, appendix C).

    The same error is the same number for a box of any size. Before a sigmoid a small box would have to be placed by
    tiny numbers.

    Args:
        boxes: (..., 4) cxcywh.
        deltas: (..., 4): of the centre, in sides; then logarithms of what the sides are multiplied by.

    Returns:
        (..., 4) cxcywh, which may reach beyond the image, in the precision of `boxes`.
    """
    deltas = deltas.to(boxes.dtype)
    centers = boxes[..., :2] + deltas[..., :2] * boxes[..., 2:]
    return torch.cat([centers, boxes[..., 2:] * deltas[..., 2:].clamp(max=LARGEST_GROWTH).exp()], dim=-1)


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


def _json_elements(text: str) -> list[Any] | None:
    """Return the complete elements of the first JSON list in the text; None if there is no list or no such element."""
    start = text.find("[")
    if start < 0:
        return None
    decoder, position, elements = json.JSONDecoder(), start + 1, []
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if text[position : position + 1] == "]":
            return elements
        try:
            element, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return elements or None
        elements.append(element)


def _detected(element: Any, image_size: tuple[int, int], frame_size: tuple[int, int]) -> DetectedObject | None:
    box = element.get("bbox_2d") if isinstance(element, dict) else None
    if not isinstance(box, list) or len(box) != 4:
        return None
    # Also rejects NaN, infinities and integers too large for a float.
    if not all(type(value) in (int, float) and abs(value) < 1e9 for value in box):
        return None
    limits = zip(box, image_size * 2, frame_size * 2, strict=True)
    x1, y1, x2, y2 = (min(max(value * size / frame, 0.0), float(size)) for value, size, frame in limits)
    if x2 < x1 or y2 < y1:
        return None
    label = element.get("label", "")
    return DetectedObject((x1, y1, x2, y2), 1.0, label if isinstance(label, str) else str(label))
