"""Which cells propose an object, and the loss that teaches them: by hand, alone as in a batch."""

import math

import pytest
import torch
from torch import Tensor, autograd
from torch.nn.utils.rnn import pad_sequence

from recipe.losses.proposals import LEAST_WEIGHT, cell_targets, objectness_loss, proposal_losses
from recipe.models.proposals import INITIAL_CELLS, ProposalHead, best_peaks, cells_of_images
from recipe.schema import LossCounts, Memory, Proposals, Target

COUNTS = LossCounts(teacher_tokens=1, student_tokens=1, objects=1, images=1, microbatches=1)
WHOLE = torch.ones(1, 2, dtype=torch.float64)


def proposals_of(logits: Tensor, extents: Tensor, boxes: Tensor | None = None) -> Proposals:
    """Of logits (N, rows, columns); boxes are the cells unless given."""
    _, rows, columns = logits.shape
    cells = cells_of_images(rows, columns, extents)
    return Proposals(cells, cells.clone() if boxes is None else boxes, logits.flatten(1))


def target_of(*boxes: tuple[float, float, float, float]) -> Target:
    found = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
    return {"boxes": found, "caption_ids": torch.zeros(len(boxes), 1, dtype=torch.int64)}


def test_cells_of_images_by_hand():
    """Of two columns the second image has one; of one row both have it. Alone they have the same bits."""
    found = cells_of_images(1, 2, torch.tensor([[1.0, 1.0], [0.5, 1.0]]))
    assert found[0].tolist() == [[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]]
    assert found[1].tolist() == [[0.5, 0.5, 1.0, 1.0], [0.0] * 4]
    for rows, columns in ((3, 7), (11, 13), (37, 49)):  # in float32, of shares that are rounded
        padded = cells_of_images(53, 59, torch.tensor([[columns / 59, rows / 53]]))[0].view(53, 59, 4)
        assert torch.equal(padded[:rows, :columns].reshape(-1, 4), cells_of_images(rows, columns, torch.ones(1, 2))[0])
        assert int((padded[..., 2] > 0).sum()) == rows * columns


def test_peaks_by_hand():
    """A cell no neighbour exceeds, also across a corner; the best first."""
    logits = torch.tensor([[[3.0, 2, 0, 0, 7], [0, 0, 0, 0, 0], [0, 0, 4, 0, 0], [0, 3, 0, 0, -1]]])
    best, found = best_peaks(proposals_of(logits, torch.ones(1, 2)), (4, 5), 3)
    assert best.tolist() == [[4, 12, 0]] and found.all()
    # All peaks: further cells are on plateaus of zeros, so they count as well; -1 is none.
    best, found = best_peaks(proposals_of(logits, torch.ones(1, 2)), (4, 5), 30)
    assert found.shape == best.shape == (1, 30) and 19 not in best[found].tolist()
    assert found[0].tolist() == sorted(found[0].tolist(), reverse=True)
    assert int(best.min()) >= 0 and int(best.max()) < 20


def test_equal_peaks_come_in_raster_order_padded_or_not():
    flat = torch.zeros(1, 3, 4)
    best, found = best_peaks(proposals_of(flat, torch.ones(1, 2)), (3, 4), 12)
    assert best[0].tolist() == list(range(12)) and found.all()
    padded = best_peaks(proposals_of(torch.zeros(1, 5, 9), torch.tensor([[4 / 9, 3 / 5]])), (5, 9), 13)
    assert padded[0][0, :12].tolist() == [row * 9 + column for row in range(3) for column in range(4)]
    assert padded[1].tolist() == [[True] * 12 + [False]]


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_padding_is_never_proposed(bad: float):
    """However high its logits are, and if none of the image's is finite."""
    logits = torch.full((2, 4, 4), 9.0)
    logits[0, :2, :2] = torch.tensor([[0.0, -1], [-1, -1]])
    logits[1, :2, :2] = bad
    best, found = best_peaks(proposals_of(logits, torch.full((2, 2), 0.5)), (4, 4), 6)
    assert best[0, 0] == 0 and found.tolist() == [[True] + [False] * 5, [False] * 6]


def test_boxes_are_of_the_image_and_begin_as_cells():
    torch.manual_seed(0)
    head = ProposalHead(16)
    finest = torch.zeros(2, 8, 8, 16)
    finest[0], finest[1, :4, :2] = torch.randn(8, 8, 16), torch.randn(4, 2, 16)
    none = torch.zeros(2, 1, 16)
    extents = torch.tensor([[[1.0, 1.0]], [[0.25, 0.5]]])
    memory = Memory(none, none, torch.ones(2, 1).bool(), none[..., :4], [finest], extents, [(8, 8), (4, 2)])
    found = head(memory)
    inside = found.cells[1, :, 2] > 0
    assert found.cells[1, inside].unique(dim=0)[:, :2].tolist() == [
        [x, y] for x in (0.25, 0.75) for y in (0.125, 0.375, 0.625, 0.875)
    ]
    assert torch.equal(found.pred_boxes[..., :2], found.cells[..., :2])
    assert torch.allclose(found.pred_boxes[..., 2:], INITIAL_CELLS * found.cells[..., 2:], atol=1e-7)
    assert torch.allclose(found.pred_objectness.sigmoid().mean(), torch.tensor(0.01), atol=0.005)
    boxes, contents, are_there = head.select(found, finest, 100)
    assert boxes.shape == (2, 100, 4) and contents.shape == (2, 100, 16) and boxes.isfinite().all()
    assert int(are_there[1].sum()) <= 8


def targets_of_one(cells: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """`cell_targets` of one image."""
    peak, owner = cell_targets(cells[None], boxes[None], torch.tensor([len(boxes)]))
    return peak[0], owner[0]


def test_targets_of_cells_by_hand():
    """Four cells in a row. The object's spread is .54 / 6 of its side, .45 at a side of 5; a cell is .25 wide."""
    cells = cells_of_images(1, 4, WHOLE)[0]
    peak, owner = targets_of_one(cells, torch.tensor([[0.4, 0.5, 5.0, 5.0]], dtype=torch.float64))
    apart = (cells[:, 0] - 0.4) / 0.45
    expected = (-0.5 * apart**2).exp()
    expected[1] = 1.0  # holds the centre
    assert torch.allclose(peak, expected) and owner.tolist() == [0] * 4
    # A small object: .35 of a cell's side at least.
    peak, _ = targets_of_one(cells, torch.tensor([[0.4, 0.5, 1e-3, 1e-3]], dtype=torch.float64))
    assert peak.tolist() == pytest.approx(
        [math.exp(-0.5 * (x / 0.35) ** 2) if x != 0.1 else 1.0 for x in (1.1, 0.1, 0.9, 1.9)]
    )


def test_two_objects_in_one_cell():
    """Both make it a peak; the other cells belong to the nearer one, and the first owns what is equal."""
    cells = cells_of_images(1, 4, WHOLE)[0]
    boxes = torch.tensor([[0.10, 0.5, 1.0, 1.0], [0.14, 0.5, 1.0, 1.0]], dtype=torch.float64)
    peak, owner = targets_of_one(cells, boxes)
    assert (peak == 1).tolist() == [True, False, False, False] and owner.tolist() == [0, 1, 1, 1]
    losses = proposal_losses(proposals_of(torch.zeros(1, 1, 4).double(), WHOLE), [target_of(*boxes.tolist())], COUNTS)
    assert all(bool(value.isfinite()) for value in losses.values())


def test_parity_with_the_equation_of_centernet():
    """Equation 1, cell by cell, in plain Python."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=generator, dtype=torch.float64) * 3
    peak = torch.rand(50, generator=generator, dtype=torch.float64)
    peak[::7] = 1.0
    expected = []
    for logit, target in zip(logits.tolist(), peak.tolist(), strict=True):
        probability = 1 / (1 + math.exp(-logit))
        if target == 1:
            expected.append(-((1 - probability) ** 2) * math.log(probability))
        else:
            expected.append(-((1 - target) ** 4) * probability**2 * math.log(1 - probability))
    assert float((objectness_loss(logits, peak) - torch.tensor(expected, dtype=torch.float64)).abs().max()) <= 1e-12


def test_terms_by_hand():
    """Two cells, one object with its centre in the first; every logit is 0, every box .1 too far to the right."""
    true = (0.25, 0.5, 0.5, 1.0)
    boxes = torch.tensor([[true, true]], dtype=torch.float64) + torch.tensor([0.1, 0, 0, 0])
    found = proposal_losses(proposals_of(torch.zeros(1, 1, 2).double(), WHOLE, boxes), [target_of(true)], COUNTS)
    # The spread is .35 cells of .5, so the neighbour's target is far below the least weight.
    neighbour = math.exp(-0.5 * (1 / 0.35) ** 2)
    assert neighbour < LEAST_WEIGHT
    assert float(found["loss_objectness_proposals"]) == pytest.approx(0.25 * math.log(2) * (1 + (1 - neighbour) ** 4))
    assert float(found["loss_bbox_proposals"]) == pytest.approx(0.1)
    assert float(found["loss_giou_proposals"]) == pytest.approx(1 - 0.4 / 0.6)


def random_case(targets: list[Target | None]) -> tuple[Proposals, list[Target | None]]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(targets), 6, 5, generator=generator, dtype=torch.float64)
    extents = torch.tensor([(1.0, 1.0), (0.6, 0.5), (0.4, 1.0)], dtype=torch.float64)[: len(targets)]
    boxes = torch.rand(len(targets), 30, 4, generator=generator, dtype=torch.float64)
    return proposals_of(logits, extents, boxes), targets


def part(proposals: Proposals, rows: slice) -> Proposals:
    return Proposals(proposals.cells[rows], proposals.pred_boxes[rows], proposals.pred_objectness[rows])


def test_halves_sum_to_the_whole():
    proposals, targets = random_case([target_of((0.5, 0.5, 0.3, 0.4), (0.1, 0.2, 0.1, 0.1)), None, target_of()])
    counts: LossCounts = {**COUNTS, "objects": 7.0, "images": 3.0}
    whole = proposal_losses(proposals, targets, counts)
    halves = [proposal_losses(part(proposals, rows), targets[rows], counts) for rows in (slice(0, 1), slice(1, 3))]
    for name, value in whole.items():
        assert float(value) == pytest.approx(sum(float(half[name]) for half in halves), rel=1e-12)
        alone = proposal_losses(proposals, targets, {**counts, "objects": 1.0})[name]
        assert float(value) == pytest.approx(float(alone) / 7)


@pytest.mark.parametrize("at_once", [1, 2 * 30 * 2, 2**21])
def test_images_together_are_each_alone(at_once: int, monkeypatch: pytest.MonkeyPatch):
    """Targets bit for bit with unlike numbers of objects; losses and gradients to rounding."""
    monkeypatch.setattr("recipe.losses.proposals.AT_ONCE", at_once)
    targets = [target_of((0.5, 0.5, 0.3, 0.4), (0.1, 0.2, 0.1, 0.1)), target_of((0.3, 0.2, 0.2, 0.1)), target_of()]
    proposals, _ = random_case([*targets])
    objects = pad_sequence([target["boxes"] for target in targets], batch_first=True)
    peaks, owners = cell_targets(proposals.cells, objects, torch.tensor([2, 1, 0]))
    proposals.pred_boxes.requires_grad_()
    proposals.pred_objectness.requires_grad_()
    inputs = (proposals.pred_boxes, proposals.pred_objectness)
    found = proposal_losses(proposals, targets, COUNTS)
    each = [
        proposal_losses(part(proposals, slice(row, row + 1)), [target], COUNTS) for row, target in enumerate(targets)
    ]
    for name, value in found.items():
        expected = torch.stack([losses[name] for losses in each]).sum()
        assert float(value) == pytest.approx(float(expected), rel=1e-12)
        for ours, theirs in zip(
            *(autograd.grad(loss, inputs, retain_graph=True, allow_unused=True) for loss in (value, expected)),
            strict=True,
        ):
            assert (ours is None) == (theirs is None)
            assert ours is None or theirs is None or float((ours - theirs).abs().max()) <= 1e-12  # measured: 0
    for row, target in enumerate(targets):
        peak, owner = targets_of_one(proposals.cells[row], target["boxes"])
        assert torch.equal(peak, peaks[row]) and torch.equal(owner[peak > 0], owners[row][peak > 0])


def test_padding_takes_no_part():
    """Also next to an object in the image's corner that is smaller than a cell."""
    proposals, targets = random_case([target_of(), target_of((0.02, 0.03, 0.03, 0.05), (0.9, 0.9, 0.1, 0.1))])
    inside = proposals.cells[1, :, 2] > 0
    alone = Proposals(*(value[1:, inside] for value in vars(proposals).values()))
    ours = proposal_losses(part(proposals, slice(1, 2)), targets[1:], COUNTS)
    for name, value in proposal_losses(alone, targets[1:], COUNTS).items():
        assert float(value) == pytest.approx(float(ours[name]), rel=1e-12)


@pytest.mark.parametrize("target", [None, target_of()])
def test_without_objects_nothing_is_lost_but_objectness(target: Target | None):
    """Nothing at all if the image is not annotated; every parameter has a gradient."""
    proposals, _ = random_case([target])
    proposals.pred_boxes.requires_grad_()
    proposals.pred_objectness.requires_grad_()
    terms = proposal_losses(proposals, [target], {**COUNTS, "objects": 0.0})
    assert terms["loss_bbox_proposals"] == terms["loss_giou_proposals"] == 0
    assert (terms["loss_objectness_proposals"] > 0) == (target is not None)
    torch.stack(list(terms.values())).sum().backward()
    assert proposals.pred_boxes.grad is not None and not proposals.pred_boxes.grad.any()
    assert proposals.pred_objectness.grad is not None
    assert bool(proposals.pred_objectness.grad.all()) == (target is not None)
