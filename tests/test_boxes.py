"""Boxes to text and back; IoU and GIoU one by one: by hand, against torchvision, and where boxes have no area."""

import math

import numpy as np
import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_convert, box_iou, generalized_box_iou, generalized_box_iou_loss

from recipe.boxes import (
    LARGEST_GROWTH,
    answer_frame,
    apply_deltas,
    elementwise_iou,
    normalized_to_pixels,
    objects_to_text,
    text_to_objects,
)
from recipe.schema import DetectedObject, Object

SIZE = (200, 100)
CAT = '{"bbox_2d": [10, 20, 30, 40], "label": "cat"}'
FOUND_CAT = DetectedObject((10.0, 20.0, 30.0, 40.0), 1.0, "cat")


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


def test_deltas_by_hand():
    """A quarter of a side to the right, half a side up; twice as wide, half as high."""
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.1], [0.9, 0.1, 0.02, 0.4]], dtype=torch.float64)
    found = apply_deltas(boxes, torch.tensor([0.25, -0.5, math.log(2), math.log(0.5)]).expand(2, 4))
    expected = torch.tensor([[0.55, 0.45, 0.4, 0.05], [0.905, -0.1, 0.04, 0.2]], dtype=torch.float64)
    assert torch.allclose(found, expected, atol=1e-7)
    assert torch.equal(apply_deltas(boxes, torch.zeros(2, 4)), boxes)


def test_deltas_are_torchvisions():
    torch.manual_seed(0)
    boxes, deltas = torch.rand(50, 4, dtype=torch.float64) + 0.1, torch.randn(50, 4, dtype=torch.float64)
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0), bbox_xform_clip=LARGEST_GROWTH)
    theirs = coder.decode_single(deltas, box_convert(boxes, "cxcywh", "xyxy"))
    # measured: 1.8e-15
    assert float((box_convert(apply_deltas(boxes, deltas), "cxcywh", "xyxy") - theirs).abs().max()) <= 1e-14


def test_deltas_of_a_model_that_diverges_are_finite_and_may_be_narrow():
    """In the precision of the boxes, whatever that of the deltas."""
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1e-3]])
    found = apply_deltas(boxes, torch.tensor([[0.0, 0.0, 3e4, 3e4]], dtype=torch.bfloat16))
    assert found.dtype == torch.float32 and found.isfinite().all()


def test_boxes_of_several_pictures_are_cut_each_to_its_own():
    """By hand, and as one image after the other: bit for bit."""
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.9, 0.5, 0.4, 1.2]]]).repeat(2, 1, 1)
    widths, heights = torch.tensor([[100], [40]]), torch.tensor([[60], [80]])  # integers, as images have
    found = normalized_to_pixels(boxes, widths, heights)
    assert found[0, 0].tolist() == [25, 15, 75, 45] and found[1, 0].tolist() == [10, 20, 30, 60]
    assert found[0, 1].tolist() == pytest.approx([70, 0, 100, 60]) and found[1, 1].tolist() == pytest.approx(
        [28, 0, 40, 80]
    )
    alone = [normalized_to_pixels(boxes[row], int(widths[row]), int(heights[row])) for row in range(2)]
    assert torch.equal(found, torch.stack(alone))


def test_the_answer_is_sorted_scaled_and_free_of_crowds():
    objects = [
        Object((10, 50, 200, 100), 'späte "Kuh"'),
        Object((60, 0.2, 80, 20), "right"),
        Object((0, 0, 20, 20), "left"),
        Object((0, 0, 200, 100), "people", iscrowd=True),
    ]
    assert objects_to_text(objects, SIZE, (100, 50)) == (
        '[{"bbox_2d": [0, 0, 10, 10], "label": "left"}, {"bbox_2d": [30, 0, 40, 10], "label": "right"}, '
        '{"bbox_2d": [5, 25, 100, 50], "label": "späte \\"Kuh\\""}]'
    )
    assert objects_to_text(objects[2:3], SIZE, (1000, 1000)) == '[{"bbox_2d": [0, 0, 100, 200], "label": "left"}]'
    assert objects_to_text([], SIZE, SIZE) == "[]"
    assert text_to_objects("[]", SIZE, SIZE) == []


@pytest.mark.parametrize("frame", [(196, 112), (1000, 1000), (28, 1008)])
def test_boxes_come_back_within_half_a_step(frame: tuple[int, int]):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((50, 2, 2)) * SIZE, axis=1).reshape(50, 4)
    objects = [Object(tuple(box), f"thing {i}\n{{") for i, box in enumerate(corners.tolist())]
    found = text_to_objects(objects_to_text(objects, SIZE, frame), SIZE, frame)
    assert found is not None
    boxes = {item.caption: item.box for item in found}
    assert len(boxes) == 50
    assert all(item.score == 1.0 for item in found)
    bound = 0.5 * np.array([SIZE[0] / frame[0], SIZE[1] / frame[1]] * 2) + 1e-9
    for item in objects:
        assert (np.abs(np.array(boxes[item.caption]) - item.box) <= bound).all()


@pytest.mark.parametrize(
    "text",
    [
        f"[{CAT}]",
        f"```json\n[\n\t{CAT}\n]\n```",
        f"Here you are: [{CAT}] I hope it helps [1].",
        f'[{CAT}, {{"bbox_2d": [1, 2, 3',
        f"[{CAT},",
        f'[{CAT}, {{"bbox_2d": [1, 2], "label": "short"}}, "dog", {{"bbox_2d": [1, 2, 3, NaN]}}]',
        f'[{CAT}, {{"bbox_2d": [30, 2, 3, 4]}}, {{"bbox_2d": [1, 2, {"9" * 400}, 4]}}, {{"bbox_2d": [true, 2, 3, 4]}}]',
    ],
)
def test_answers_are_read_with_patience(text: str):
    assert text_to_objects(text, SIZE, SIZE) == [FOUND_CAT]


def test_labels_may_be_missing_and_boxes_are_cut_to_the_picture():
    text = '[{"bbox_2d": [-5, 2.5, 999, 40]}, {"bbox_2d": [1, 2, 3, 4], "label": 7}]'
    first, second = text_to_objects(text, SIZE, SIZE) or []
    assert first == DetectedObject((0.0, 2.5, 200.0, 40.0), 1.0, "")
    assert second.caption == "7"


@pytest.mark.parametrize("text", ["", "no objects", '[{"bbox_2d": [1, 2', "[1, 2]", "[" * 5000, f"{CAT}"])
def test_what_is_no_list_of_boxes_does_not_parse(text: str):
    assert text_to_objects(text, SIZE, SIZE) is None


def test_frames():
    assert answer_frame("absolute", (56, 84)) == (56, 84)
    assert answer_frame("normalized_1000", (56, 84)) == (1000, 1000)
    with pytest.raises(ValueError, match=r"'relative'.*absolute or normalized_1000"):
        answer_frame("relative", (56, 84))
