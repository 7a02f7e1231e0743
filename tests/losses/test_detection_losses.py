"""The head's loss terms: by hand, against Hugging Face's DETR, and where there is nothing to lose."""

import math

import pytest
import torch
from loss_cases import COUNTS, make_outputs, make_target, random_boxes, random_outputs, random_targets
from torch import Tensor
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss, sigmoid_focal_loss

from recipe.config import LossConfig
from recipe.losses.terms import box_losses, caption_loss, denoising_losses, detection_losses
from recipe.models.matcher import match
from recipe.schema import DenoisingQueries, DetectionOutputs, LossCounts, Matches, Target

LN2 = math.log(2)


def matches_of(*triples: tuple[int, int, int]) -> Matches:
    return Matches(*torch.tensor(triples, dtype=torch.int64).view(-1, 3).unbind(1))


def values(terms: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in terms.items()}


def test_terms_by_hand():
    """One matched query of two: L1 0.25, IoU 1/3 in a tight hull; focal at logit 0 is (.25 or .75) * .25 * ln 2."""
    boxes = torch.tensor([[[0.25, 0.5, 0.5, 1.0], [0.9, 0.9, 0.1, 0.1]]], dtype=torch.float64)
    outputs = make_outputs(boxes, torch.zeros(1, 2, dtype=torch.float64))
    targets: list[Target | None] = [make_target(torch.tensor([[0.5, 0.5, 0.5, 1.0]]))]
    counts: LossCounts = {**COUNTS, "objects": 4, "images": 2}
    terms = values(detection_losses(outputs, [matches_of((0, 0, 0))], targets, counts, LossConfig()))
    assert terms == {
        "loss_bbox": pytest.approx(0.25 / 4),
        "loss_giou": pytest.approx((1 - 1 / 3) / 4),
        "loss_objectness": pytest.approx((0.25 + 0.75) * 0.25 * LN2 / 2),
    }


def test_boxes_apart_have_a_giou_below_zero():
    """Two unit squares with one between them: GIoU = 0 - 1/3."""
    terms = values(box_losses(torch.tensor([[0.5, 0.5, 1.0, 1.0]]), torch.tensor([[2.5, 0.5, 1.0, 1.0]])))
    assert terms == {"loss_bbox": pytest.approx(2.0), "loss_giou": pytest.approx(4 / 3)}


def test_caption_loss_is_the_mean_of_each_image_over_all_images():
    """Image 0: two tokens of ln 2 and ln 4; image 2: one of ln 4; images 1 and 3 have none: (1.5 + 2) ln 2 / 4."""
    losses = torch.tensor([LN2, 2 * LN2, 2 * LN2], dtype=torch.float64)
    loss = caption_loss(losses, torch.tensor([0, 0, 2]), 4, {**COUNTS, "images": 4})
    assert float(loss) == pytest.approx(3.5 * LN2 / 4)


def test_caption_loss_without_captions_is_zero_with_a_gradient():
    losses = torch.zeros(0, requires_grad=True)
    loss = caption_loss(losses, torch.zeros(0, dtype=torch.int64), 1, COUNTS)
    loss.backward()
    assert float(loss.detach()) == 0 and losses.grad is not None


@pytest.mark.parametrize("seed", range(3))
def test_parity_with_hugging_face_detr(seed: int):
    """`loss_bbox` and `loss_giou`, of the last layer and of the two before it, with Hugging Face's own matching."""
    outputs = random_outputs(4, 12, seed, num_layers=3)
    targets = random_targets([3, 1, 0, 12], seed)
    counts: LossCounts = {**COUNTS, "objects": 16, "images": 4}
    layers = [*outputs.aux_outputs, outputs]
    ours = values(detection_losses(outputs, match(layers, targets, 5, 2, 0), targets, counts, LossConfig()))
    criterion = ImageLoss(HungarianMatcher(class_cost=0, bbox_cost=5, giou_cost=2), 1, 0.1, ["boxes"])
    as_theirs = [{"logits": torch.zeros(4, 12, 2), "pred_boxes": layer.pred_boxes} for layer in layers]
    theirs = values(
        criterion(
            {**as_theirs[2], "auxiliary_outputs": as_theirs[:2]},
            [
                {"class_labels": torch.zeros(len(t["boxes"]), dtype=torch.int64), "boxes": t["boxes"]}
                for t in targets
                if t is not None
            ],
        )
    )
    # measured: 0 and 1.4e-7; torchvision adds 1e-7 to the denominators of GIoU
    for name, tolerance in (("loss_bbox", 1e-12), ("loss_giou", 1e-6)):
        assert ours[name] == pytest.approx(theirs[name], rel=tolerance)
        assert ours[f"{name}_aux"] == pytest.approx(theirs[f"{name}_0"] + theirs[f"{name}_1"], rel=tolerance)


def test_objectness_parity_with_hugging_face_focal_loss():
    """Hugging Face's is a mean over queries where ours is a sum."""
    outputs, targets = random_outputs(3, 7, seed=5), random_targets([2, 0, 4], seed=5)
    matches = match([outputs], targets, 5, 2, 2)
    ours = detection_losses(outputs, matches, targets, {**COUNTS, "images": 3}, LossConfig())["loss_objectness"]
    is_object = torch.zeros(3, 7, dtype=torch.float64)
    is_object[matches[0].image, matches[0].query] = 1
    theirs = sigmoid_focal_loss(outputs.pred_objectness, is_object, num_boxes=3) * 7
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)


def test_denominators_are_those_given():
    outputs, targets = random_outputs(2, 6, seed=3, num_layers=2), random_targets([2, 3], seed=3)
    matches = match([*outputs.aux_outputs, outputs], targets, 5, 2, 2)
    one = values(detection_losses(outputs, matches, targets, COUNTS, LossConfig()))
    many = values(detection_losses(outputs, matches, targets, {**COUNTS, "objects": 10, "images": 4}, LossConfig()))
    divisors = {"loss_bbox": 10, "loss_giou": 10, "loss_objectness": 4}
    assert many == {name: pytest.approx(one[name] / divisors[name.removesuffix("_aux")]) for name in one}
    assert len(one) == 6


def test_groups_are_averaged_by_hand():
    """Of two further groups, each with two layers, the L1 distances 0.1 to 0.4: 0.3 + 0.7 over two groups."""
    true = torch.tensor([[0.5, 0.5, 0.2, 0.2]], dtype=torch.float64)

    def layer(distance: float) -> DetectionOutputs:
        moved = true + torch.tensor([distance, 0, 0, 0])
        return make_outputs(moved[None], torch.zeros(1, 1, dtype=torch.float64))

    def branch(*distances: float) -> DetectionOutputs:
        *earlier, last = map(layer, distances)
        last.aux_outputs = earlier
        return last

    outputs = branch(0.05, 0.06)
    outputs.groups = [branch(0.1, 0.2), branch(0.3, 0.4)]
    layers = outputs.layers()
    assert [suffix for suffix, _ in layers] == [*["_group"] * 4, "_aux", ""]
    targets: list[Target | None] = [make_target(true)]
    matches = match([layer for _, layer in layers], targets, 5, 2, 2)
    terms = values(detection_losses(outputs, matches, targets, {**COUNTS, "objects": 2}, LossConfig()))
    expected = {"": 0.06, "_aux": 0.05, "_group": 0.5}
    assert {name: term for name, term in terms.items() if "bbox" in name} == {
        f"loss_bbox{suffix}": pytest.approx(distance / 2) for suffix, distance in expected.items()
    }
    objectness = 0.25 * 0.25 * LN2  # of one matched query at the logit 0
    assert terms["loss_objectness_group"] == pytest.approx(2 * objectness)
    assert terms["loss_objectness"] == pytest.approx(objectness)


def test_layers_and_groups_together_are_each_alone():
    """All terms at once, and their gradients, are those of one layer after the other."""
    branches = [random_outputs(3, 6, seed, num_layers=2) for seed in range(3)]
    outputs = branches[0]
    outputs.groups = branches[1:]
    targets, config = random_targets([2, None, 9], seed=4), LossConfig(objectness="mal")
    together = detection_losses(
        outputs, match([layer for _, layer in outputs.layers()], targets, 5, 2, 2), targets, COUNTS, config
    )
    sums: dict[str, Tensor] = {}
    for suffix, layer in outputs.layers():
        bare = make_outputs(layer.pred_boxes, layer.pred_objectness)
        share = 0.5 if suffix == "_group" else 1.0
        for name, term in detection_losses(bare, match([bare], targets, 5, 2, 2), targets, COUNTS, config).items():
            sums[name + suffix] = sums.get(name + suffix, torch.zeros(())) + share * term
    assert values(together) == {name: pytest.approx(value, rel=1e-12) for name, value in values(sums).items()}
    leaves = [tensor for _, layer in outputs.layers() for tensor in (layer.pred_boxes, layer.pred_objectness)]
    ours, theirs = (torch.autograd.grad(torch.stack(list(t.values())).sum(), leaves) for t in (together, sums))
    for one, other in zip(ours, theirs, strict=True):
        # measured: 5.6e-17
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


def test_no_objects_anywhere_leaves_objectness_alone():
    outputs, targets = random_outputs(2, 6, seed=3), random_targets([0, 0], seed=3)
    counts: LossCounts = {**COUNTS, "objects": 0}
    terms = detection_losses(outputs, match([outputs], targets, 5, 2, 2), targets, counts, LossConfig())
    assert float(terms["loss_bbox"].detach()) == float(terms["loss_giou"].detach()) == 0
    assert float(terms["loss_objectness"].detach()) > 0
    torch.stack(list(terms.values())).sum().backward()
    assert not gradient(outputs.pred_boxes).any() and gradient(outputs.pred_objectness).all()


def test_images_that_are_not_annotated_take_no_part():
    outputs, targets = random_outputs(3, 6, seed=4, num_layers=2), random_targets([2, None, 0], seed=4)
    matches = match([*outputs.aux_outputs, outputs], targets, 5, 2, 2)
    terms = detection_losses(outputs, matches, targets, COUNTS, LossConfig())
    torch.stack(list(terms.values())).sum().backward()
    for layer in [*outputs.aux_outputs, outputs]:
        assert not gradient(layer.pred_boxes)[1].any() and not gradient(layer.pred_objectness)[1].any()
        assert gradient(layer.pred_boxes)[0].any() and gradient(layer.pred_objectness)[2].all()


def test_objects_beyond_the_queries_still_count_in_the_denominator():
    outputs, targets = random_outputs(1, 2, seed=6), random_targets([5], seed=6)
    matches = match([outputs], targets, 5, 2, 2)
    assert len(matches[0]) == 2
    terms = detection_losses(outputs, matches, targets, {**COUNTS, "objects": 5}, LossConfig())
    assert targets[0] is not None
    matched = (outputs.pred_boxes[0, matches[0].query] - targets[0]["boxes"][matches[0].target]).abs().sum()
    assert float(terms["loss_bbox"].detach()) == pytest.approx(float(matched.detach()) / 5)


def test_denoising_terms_are_means_over_groups():
    """Two groups of one positive and one negative; the second image's queries are padding and count for nothing."""
    generator = torch.Generator().manual_seed(0)
    true = torch.tensor([0.5, 0.5, 0.2, 0.2], dtype=torch.float64)
    queries = DenoisingQueries(
        boxes=torch.zeros(2, 4, 4),
        valid=torch.tensor([[True] * 4, [False] * 4]),
        target_boxes=true.expand(2, 4, 4),
        positive=torch.tensor([True, False, True, False]).expand(2, 4),
        num_groups=2,
    )
    logits = torch.zeros(2, 4, dtype=torch.float64)
    first = make_outputs(random_boxes(2, 4, generator=generator), logits)
    last = make_outputs(random_boxes(2, 4, generator=generator), logits, [first])
    counts: LossCounts = {**COUNTS, "objects": 3, "images": 5}
    terms = values(denoising_losses((queries, last), last, counts, LossConfig()))
    l1 = sum((layer.pred_boxes[0, [0, 2]] - true).abs().sum() for layer in (first, last))
    assert terms["loss_bbox_dn"] == pytest.approx(float(l1) / (3 * 2))
    assert terms["loss_objectness_dn"] == pytest.approx(2 * 2 * (0.25 + 0.75) * 0.25 * LN2 / (5 * 2))


def test_without_denoising_queries_the_terms_are_zero():
    outputs = random_outputs(1, 3, seed=0)
    assert values(denoising_losses(None, outputs, COUNTS, LossConfig())) == {
        "loss_bbox_dn": 0,
        "loss_giou_dn": 0,
        "loss_objectness_dn": 0,
    }


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def test_not_finite_predictions_give_a_term_that_says_so():
    """The matcher survives them, the loss must not hide them: the guard looks at the terms."""
    boxes = torch.full((1, 2, 4), math.nan, dtype=torch.float64)
    outputs: DetectionOutputs = make_outputs(boxes, torch.zeros(1, 2, dtype=torch.float64))
    targets = random_targets([1], seed=0)
    terms = values(detection_losses(outputs, match([outputs], targets, 5, 2, 2), targets, COUNTS, LossConfig()))
    assert math.isnan(terms["loss_bbox"]) and math.isnan(terms["loss_giou"])
