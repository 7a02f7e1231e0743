"""The Hungarian matcher: by hand, against a double loop and Hugging Face's, and on input that is not fair."""

import math

import pytest
import torch
from loss_cases import make_outputs, make_target, random_outputs, random_targets
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers.loss.loss_for_object_detection import HungarianMatcher

from recipe.models import matcher
from recipe.models.matcher import UNUSABLE, cost_matrix, match
from recipe.schema import DetectionOutputs, Matches, Target

COSTS = (5.0, 2.0, 2.0)
FOCAL = (0.25, 2.0)


def pairs(matches: Matches) -> list[tuple[int, int, int]]:
    return sorted(zip(matches.image.tolist(), matches.query.tolist(), matches.target.tolist(), strict=True))


def naive_cost(box: list[float], logit: float, target: list[float]) -> float:
    """One pair's cost, number by number."""
    (x, y, w, h), (tx, ty, tw, th) = box, target
    l1 = abs(x - tx) + abs(y - ty) + abs(w - tw) + abs(h - th)
    wide = max(0.0, min(x + w / 2, tx + tw / 2) - max(x - w / 2, tx - tw / 2))
    high = max(0.0, min(y + h / 2, ty + th / 2) - max(y - h / 2, ty - th / 2))
    union = w * h + tw * th - wide * high
    hull_wide = max(x + w / 2, tx + tw / 2) - min(x - w / 2, tx - tw / 2)
    hull_high = max(y + h / 2, ty + th / 2) - min(y - h / 2, ty - th / 2)
    giou = wide * high / union - (hull_wide * hull_high - union) / (hull_wide * hull_high)
    p = 1 / (1 + math.exp(-logit))
    objectness = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
    return COSTS[0] * l1 + COSTS[1] * (1 - giou) + COSTS[2] * objectness


def naive_costs(layer: DetectionOutputs, image: int, target: Target) -> list[list[float]]:
    return [
        [naive_cost(box, logit, true) for true in target["boxes"].tolist()]
        for box, logit in zip(layer.pred_boxes[image].tolist(), layer.pred_objectness[image].tolist(), strict=True)
    ]


def test_cost_by_hand():
    """Boxes side by side, half over one another: IoU 1/3 and a tight hull; at logit 0 the focal cost is -ln 2 / 8."""
    box, true = torch.tensor([[[[0.25, 0.5, 0.5, 1.0]]]]), torch.tensor([[[0.5, 0.5, 0.5, 1.0]]])
    logit = torch.zeros(1, 1, 1)
    found = [float(cost_matrix(box, logit, true, *weights, *FOCAL)) for weights in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert found == pytest.approx([0.25, 2 / 3, -math.log(2) / 8], abs=1e-6)


def test_two_queries_and_two_objects_by_hand():
    """L1 costs [[.1, .2], [.2, .5]]: the cheapest pair is not part of the cheapest assignment."""
    queries = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.2, 0.5, 0.2, 0.2]]])
    objects = torch.tensor([[0.4, 0.5, 0.2, 0.2], [0.7, 0.5, 0.2, 0.2]])
    cost = cost_matrix(queries[None], torch.zeros(1, 1, 2), objects[None], 1, 0, 0, *FOCAL)
    assert cost[0, 0].tolist() == [pytest.approx([0.1, 0.2]), pytest.approx([0.2, 0.5])]
    outputs = make_outputs(queries, torch.zeros(1, 2))
    assert pairs(match([outputs], [make_target(objects)], 1, 0, 0)[0]) == [(0, 0, 1), (0, 1, 0)]


@pytest.mark.parametrize("seed", range(4))
def test_parity_with_scipy_on_a_double_loop(seed: int):
    outputs = random_outputs(4, 9, seed, num_layers=3)
    targets = random_targets([3, None, 0, 9], seed)
    for layer, matches in zip(
        [*outputs.aux_outputs, outputs], match([*outputs.aux_outputs, outputs], targets, *COSTS), strict=True
    ):
        expected = []
        for image, target in enumerate(targets):
            if target is not None and len(target["boxes"]):
                costs = naive_costs(layer, image, target)
                found = cost_matrix(
                    layer.pred_boxes[None], layer.pred_objectness[None], target["boxes"][None], *COSTS, *FOCAL
                )[0, image]
                # measured: 3.5e-6 of costs up to 9, in float32
                assert float((found - torch.tensor(costs)).abs().max()) <= 1e-5
                expected += [(image, int(q), int(t)) for q, t in zip(*linear_sum_assignment(costs), strict=True)]
        assert pairs(matches) == sorted(expected)


@pytest.mark.parametrize("seed", range(4))
def test_parity_with_hugging_face_on_shared_costs(seed: int):
    """Hugging Face's class cost is a softmax over classes; without it the costs are the same."""
    outputs, targets = random_outputs(5, 20, seed), random_targets([3, 1, 7, 0, 20], seed)
    theirs = HungarianMatcher(class_cost=0, bbox_cost=5, giou_cost=2)(
        {"logits": torch.zeros(5, 20, 2), "pred_boxes": outputs.pred_boxes.float()},
        [
            {"class_labels": torch.zeros(len(t["boxes"]), dtype=torch.int64), "boxes": t["boxes"].float()}
            for t in targets
            if t is not None
        ],
    )
    expected = [(i, int(q), int(t)) for i, (qs, ts) in enumerate(theirs) for q, t in zip(qs, ts, strict=True)]
    assert pairs(match([outputs], targets, 5, 2, 0)[0]) == sorted(expected)


def test_layers_and_images_together_are_each_alone():
    outputs, targets = random_outputs(3, 8, seed=1, num_layers=3), random_targets([4, 2, 6], seed=1)
    layers = [*outputs.aux_outputs, outputs]
    together = match(layers, targets, *COSTS)
    for layer, matches in zip(layers, together, strict=True):
        assert pairs(match([layer], targets, *COSTS)[0]) == pairs(matches)
        alone = []
        for image in range(3):
            row = slice(image, image + 1)
            single = make_outputs(layer.pred_boxes[row], layer.pred_objectness[row])
            alone += [(image, q, t) for _, q, t in pairs(match([single], targets[row], *COSTS)[0])]
        assert pairs(matches) == alone


def test_more_objects_than_queries_match_the_best():
    """Two queries on two of three objects: the third is left over."""
    objects = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]])
    outputs = make_outputs(objects[None, [2, 0]], torch.zeros(1, 2))
    assert pairs(match([outputs], [make_target(objects)], *COSTS)[0]) == [(0, 0, 2), (0, 1, 0)]


def test_no_objects_and_not_annotated_match_nothing():
    outputs = random_outputs(3, 4, seed=0)
    assert [pairs(m) for m in match([outputs, outputs], random_targets([0, None, 0], 0), *COSTS)] == [[], []]
    assert pairs(match([outputs], random_targets([None, 2, 0], 0), *COSTS)[0])[0][0] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["boxes", "logits", "both"])
def test_predictions_that_are_not_finite(value: float, what: str):
    """Such queries are taken only where no other is left; scipy alone raises on them."""
    outputs, targets = random_outputs(2, 5, seed=2), random_targets([2, 3], seed=2)
    boxes, logits = outputs.pred_boxes.detach().clone(), outputs.pred_objectness.detach().clone()
    spoil(boxes, logits, value, what, slice(0, 2))
    assert not {q for _, q, _ in pairs(match([make_outputs(boxes, logits)], targets, *COSTS)[0])} & usable(value, what)
    spoil(boxes, logits, value, what, slice(0, 5))
    all_spoiled = match([make_outputs(boxes, logits)], targets, *COSTS)[0]
    assert [(i, t) for i, _, t in pairs(all_spoiled)] and len(all_spoiled) == 5


def spoil(boxes: Tensor, logits: Tensor, value: float, what: str, queries: slice) -> None:
    if what != "logits":
        boxes[:, queries, 2] = value
    if what != "boxes":
        logits[:, queries] = value


def usable(value: float, what: str) -> set[int]:
    """Queries 0 and 1 must go unused, except that a logit of plus infinity is a certain object."""
    return set() if what == "logits" and value == math.inf else {0, 1}


def test_the_cost_of_what_is_not_finite():
    boxes = torch.full((1, 1, 1, 4), math.nan)
    cost = cost_matrix(boxes, torch.zeros(1, 1, 1), torch.full((1, 1, 4), 0.5), *COSTS, *FOCAL)
    assert cost.item() == UNUSABLE


def test_images_in_parts_are_matched_as_together(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = random_outputs(6, 9, 3, num_layers=2)
    targets = random_targets([3, None, 0, 9, 12, 1], 3)
    layers = [*outputs.aux_outputs, outputs]
    found = []
    for size in (1, 200, 10**9):  # alone, some together, all together
        monkeypatch.setattr(matcher, "CPU_PIECE", size)
        found.append([pairs(matches) for matches in match(layers, targets, *COSTS)])
    assert found[0] == found[1] == found[2]
    assert [len(layer) for layer in found[0]] == [3 + 9 + 9 + 1] * 2
