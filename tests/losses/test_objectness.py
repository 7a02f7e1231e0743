"""IoU-aware objectness: MAL by hand, at its ends, and against the paper's formula."""

import math
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from loss_cases import COUNTS, make_outputs, make_target, random_outputs, random_targets
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from recipe.config import LossConfig
from recipe.losses.terms import denoising_losses, detection_losses, objectness_loss
from recipe.models.matcher import match
from recipe.schema import DenoisingQueries, DetectionOutputs, LossCounts, Matches, Target

LN2, LN3, LN4 = (math.log(n) for n in (2, 3, 4))
KINDS = ("focal", "mal")


@dataclass(frozen=True)
class Case:
    """One query: its logit, whether it is matched, and the IoU of its box."""

    logit: float
    is_object: bool
    iou: float = 0.0

    def loss(self, kind: str, gamma: float = 2.0) -> tuple[float, float]:
        """The loss, and its gradient on the logit."""
        logit = torch.tensor(self.logit, dtype=torch.float64, requires_grad=True)
        is_object, iou = torch.tensor(float(self.is_object)).double(), torch.tensor(self.iou).double()
        loss = objectness_loss(logit, is_object, iou, LossConfig(objectness=kind, focal_gamma=gamma))
        (gradient,) = torch.autograd.grad(loss, logit)
        return float(loss.detach()), float(gradient)


@pytest.mark.parametrize(
    ("kind", "case", "gamma", "expected"),
    [
        # At the logit ln 3 the probability is 3/4: cross-entropy with the target t is t ln 4/3 + (1 - t) ln 4.
        ("mal", Case(LN3, True, 0.5), 2.0, 0.25 * (LN4 - LN3) + 0.75 * LN4),
        ("mal", Case(LN3, True, 0.25), 1.5, 0.125 * (LN4 - LN3) + 0.875 * LN4),
        ("mal", Case(LN3, False), 2.0, 0.75**2 * LN4),
        ("mal", Case(LN3, False), 1.5, 0.75**1.5 * LN4),
        ("mal", Case(LN3, False), 0.0, LN4),  # 0 ** 0 is no target of an empty query
        ("focal", Case(LN3, True, 0.5), 2.0, 0.25 * 0.25**2 * (LN4 - LN3)),
        ("focal", Case(LN3, True, 0.5), 1.0, 0.25 * 0.25 * (LN4 - LN3)),
    ],
)
def test_by_hand(kind: str, case: Case, gamma: float, expected: float):
    assert case.loss(kind, gamma)[0] == pytest.approx(expected, rel=1e-7)


def test_the_share_of_objects_in_the_focal_loss():
    config, logit = LossConfig(focal_alpha=0.6), torch.tensor(0.0).double()
    one, zero = torch.ones(()).double(), torch.zeros(()).double()
    assert float(objectness_loss(logit, one, zero, config)) == pytest.approx(0.6 * 0.25 * LN2)
    assert float(objectness_loss(logit, zero, zero, config)) == pytest.approx(0.4 * 0.25 * LN2)


def test_the_ends_of_the_iou():
    """A match without overlap is pushed down as an empty query is; a perfect one has plain cross-entropy."""
    for logit in (-2.0, 0.0, 3.0):
        probability = 1 / (1 + math.exp(-logit))
        assert Case(logit, True, 0.0).loss("mal") == pytest.approx((-math.log(1 - probability), probability))
        assert Case(logit, True, 1.0).loss("mal") == pytest.approx((-math.log(probability), probability - 1))


def test_an_empty_query_is_pushed_down_by_its_detached_weight():
    """Focal weighs it 1 - alpha and also differentiates the weight; MAL does neither."""
    for logit in (-2.0, 0.5):
        p = 1 / (1 + math.exp(-logit))
        assert Case(logit, False).loss("mal")[1] == pytest.approx(p**3)
        assert Case(logit, False).loss("focal")[0] == pytest.approx(0.75 * Case(logit, False).loss("mal")[0])
        assert Case(logit, False).loss("focal")[1] > 0.75 * p**3


def test_the_best_objectness_is_a_power_of_the_iou():
    """With MAL, the gradient of a matched query vanishes at its IoU ** gamma."""
    for iou in (0.2, 0.7):
        target = iou**1.5
        assert Case(math.log(target / (1 - target)), True, iou).loss("mal", 1.5)[1] == pytest.approx(0, abs=1e-7)


def from_boxes(
    kind: str, outputs: DetectionOutputs, matches: Matches, targets: list[Target | None], images: float
) -> Tensor:
    counts: LossCounts = {**COUNTS, "images": images}
    return detection_losses(outputs, [matches], targets, counts, LossConfig(objectness=kind))["loss_objectness"]


def test_parity_with_the_formula_query_by_query():
    """MAL of Huang et al. 2025 (DEIM), as the paper writes it."""
    outputs, targets = random_outputs(3, 6, seed=9), random_targets([3, None, 6], seed=9)
    (matches,) = match([outputs], targets, 5, 2, 2)
    pairs = {(int(i), int(q)): int(t) for i, q, t in zip(matches.image, matches.query, matches.target, strict=True)}
    expected = 0.0
    for image in (0, 2):
        for query in range(6):
            p = float(outputs.pred_objectness[image, query].detach().sigmoid())
            if (image, query) not in pairs:
                expected += p**2 * -math.log(1 - p)
                continue
            truth = cast(Target, targets[image])["boxes"][pairs[image, query]]
            corners = [
                box_convert(box[None].detach(), "cxcywh", "xyxy") for box in (outputs.pred_boxes[image, query], truth)
            ]
            target = float(box_iou(*corners)) ** 2
            expected += target * -math.log(p) + (1 - target) * -math.log(1 - p)
    found = from_boxes("mal", outputs, matches, targets, 2)
    assert float(found.detach()) == pytest.approx(expected / 2, rel=1e-9)
    assert torch.autograd.grad(found, outputs.pred_boxes, allow_unused=True) == (None,)


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_annotation_or_objects(kind: str):
    outputs, targets = random_outputs(2, 5, seed=1), random_targets([None, 0], seed=1)
    loss = from_boxes(kind, outputs, match([outputs], targets, 5, 2, 2)[0], targets, 1)
    loss.backward()
    assert outputs.pred_objectness.grad is not None
    assert outputs.pred_objectness.grad.any(1).tolist() == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_bfloat16_lose_nothing_more(kind: str):
    """As autocast gives them: the loss is that of the same numbers in float32."""
    whole, targets = random_outputs(2, 6, seed=2), random_targets([3, 2], seed=2)
    boxes, logits = whole.pred_boxes.detach().float(), whole.pred_objectness.detach().bfloat16()
    (matches,) = match([whole], targets, 5, 2, 2)
    rounded, same = (make_outputs(boxes, numbers) for numbers in (logits, logits.float()))
    assert torch.equal(from_boxes(kind, rounded, matches, targets, 1), from_boxes(kind, same, matches, targets, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_that_are_not_finite_leave_objectness_finite(kind: str):
    """Their own terms say so; a target that is no number would spoil every weight."""
    boxes = torch.tensor([[[math.nan] * 4, [math.inf] * 4, [0.5, 0.5, 0.0, 0.0]]], dtype=torch.float64)
    outputs = make_outputs(boxes, torch.zeros(1, 3, dtype=torch.float64))
    targets: list[Target | None] = [make_target(torch.tensor([[0.5, 0.5, 0.2, 0.2]] * 3))]
    assert bool(from_boxes(kind, outputs, match([outputs], targets, 5, 2, 2)[0], targets, 1).isfinite())


def test_denoising_queries_by_hand():
    """A positive with the IoU 1/3 and a negative next to it, both at the logit ln 3; the second image is padding."""
    queries = DenoisingQueries(
        boxes=torch.zeros(2, 2, 4),
        valid=torch.tensor([[True, True], [False, False]]),
        target_boxes=torch.tensor([0.5, 0.5, 0.5, 1.0]).expand(2, 2, 4),
        positive=torch.tensor([True, False]).expand(2, 2),
        num_groups=1,
    )
    boxes = torch.tensor([0.25, 0.5, 0.5, 1.0], dtype=torch.float64).expand(2, 2, 4)
    outputs = make_outputs(boxes, torch.full((2, 2), LN3, dtype=torch.float64))
    counts: LossCounts = {**COUNTS, "images": 2}
    terms = denoising_losses((queries, outputs), outputs, counts, LossConfig(objectness="mal"))
    matched = (LN4 - LN3) / 9 + LN4 * 8 / 9
    assert float(terms["loss_objectness_dn"]) == pytest.approx((matched + 0.75**2 * LN4) / 2)
