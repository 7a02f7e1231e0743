"""IoU and GIoU one by one: by hand, against torchvision, and where boxes have no area."""

import pytest
import torch
from torchvision.ops import box_convert, box_iou, generalized_box_iou, generalized_box_iou_loss

from recipe.boxes import elementwise_iou, normalized_to_pixels


def random_boxes(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, 4, generator=generator, dtype=torch.float64) * 0.5 + 0.05


def test_by_hand():
    """Two of 2 x 2, half over one another: IoU 2 / 6, a tight hull; two unit squares with one between: 0 and -1 / 3."""
    iou, giou = elementwise_iou(
        torch.tensor([[1.0, 1, 2, 2], [0.5, 0.5, 1, 1]]), torch.tensor([[2.0, 1, 2, 2], [2.5, 0.5, 1, 1]])
    )
    assert iou.tolist() == pytest.approx([1 / 3, 0])
    assert giou.tolist() == pytest.approx([1 / 3, -1 / 3])


def test_all_pairs_are_torchvisions():
    boxes, others = random_boxes(30, seed=0), random_boxes(20, seed=1)
    iou, giou = elementwise_iou(boxes[:, None], others)
    corners = [box_convert(part, "cxcywh", "xyxy") for part in (boxes, others)]
    assert torch.allclose(iou, box_iou(*corners), rtol=0, atol=1e-15)  # measured: 0.0
    assert torch.allclose(giou, generalized_box_iou(*corners), rtol=0, atol=1e-15)  # measured: 0.0


def test_gradients_are_torchvisions():
    """Of the loss with an epsilon; measured: 1.9e-5 of 6.6."""
    boxes, others = random_boxes(200, seed=2).requires_grad_(), random_boxes(200, seed=3)
    _, giou = elementwise_iou(boxes, others)
    (found,) = torch.autograd.grad((1 - giou).sum(), boxes)
    ours, theirs = (box_convert(part, "cxcywh", "xyxy") for part in (boxes, others))
    loss = generalized_box_iou_loss(ours, theirs)
    (expected,) = torch.autograd.grad(loss.sum(), boxes)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("boxes", [[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.2, 0.0], [0.5, 0.5, 0.2, 0.2]])
def test_boxes_without_an_area_have_numbers_and_gradients(boxes: list[float]):
    row = torch.tensor([boxes], requires_grad=True)
    for other in (row.detach(), torch.tensor([[0.1, 0.1, 0.0, 0.0]])):
        iou, giou = elementwise_iou(row, other)
        (gradient,) = torch.autograd.grad((iou + giou).sum(), row)
        assert torch.isfinite(iou) and torch.isfinite(giou) and torch.isfinite(gradient).all()


def test_half_precision_is_computed_in_float32():
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2]]).bfloat16()
    iou, giou = elementwise_iou(boxes, boxes)
    assert iou.dtype == giou.dtype == torch.float32
    assert iou.item() == giou.item() == pytest.approx(1)


def test_boxes_of_several_pictures_are_cut_each_to_its_own():
    """By hand, and as one picture after the other: bit for bit."""
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.9, 0.5, 0.4, 1.2]]]).repeat(2, 1, 1)
    widths, heights = torch.tensor([[100], [40]]), torch.tensor([[60], [80]])  # integers, as pictures have
    found = normalized_to_pixels(boxes, widths, heights)
    assert found[0, 0].tolist() == [25, 15, 75, 45] and found[1, 0].tolist() == [10, 20, 30, 60]
    assert found[0, 1].tolist() == pytest.approx([70, 0, 100, 60]) and found[1, 1].tolist() == pytest.approx(
        [28, 0, 40, 80]
    )
    alone = [normalized_to_pixels(boxes[row], int(widths[row]), int(heights[row])) for row in range(2)]
    assert torch.equal(found, torch.stack(alone))
