"""Where queries look first, queries chosen from proposals, groups of queries: by hand, alone as in a batch."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from recipe.checkpoints.weights import fill
from recipe.config import RecipeConfig
from recipe.joint import JointModel
from recipe.models.detection_head import DecoderLayer, DetectionHead, make_denoising_queries
from recipe.models.layers import LOCALITY, Attention, compass
from recipe.models.memory import grid_cells, sides_in_tokens, sine_embedding
from recipe.models.pyramid import pad_maps
from recipe.schema import DetectionOutputs, Example, LossCounts, Memory, Target
from tests.support.tiny_cases import ALL_SWITCHES, NUM_QUERIES, collator, losses_and_gradients, make_batches, make_model

WIDTH, QUERIES = 16, 4
NAMES = ("pred_boxes", "pred_objectness", "query_features")
COUNTS = LossCounts(teacher_tokens=1, student_tokens=1, objects=1, images=1, microbatches=1)


def make_memory(grids: list[tuple[int, int]], num_words: int, seed: int = 0) -> Memory:
    """Random tokens and maps of images of (rows, columns), each with words; an image's own, whatever is next to it."""
    tokens = [
        torch.randn(
            rows * columns + num_words, WIDTH, generator=torch.Generator().manual_seed(seed + rows), dtype=torch.float64
        )
        for rows, columns in grids
    ]
    vision = pad_sequence([grid_cells(*grid).double() for grid in grids], batch_first=True)
    cells = nn.functional.pad(vision, (0, 0, 0, num_words))
    words = [part[rows * columns :] for part, (rows, columns) in zip(tokens, grids, strict=True)]
    seen = [part[: rows * columns] for part, (rows, columns) in zip(tokens, grids, strict=True)]
    states = torch.cat([pad_sequence(seen, batch_first=True), torch.stack(words)], dim=1)
    mask = cells[..., 2] > 0
    mask[:, vision.shape[1] :] = True
    positions = sine_embedding(cells[..., :2] * sides_in_tokens(cells)[:, None], WIDTH) * (cells[..., 2:3] > 0)
    return Memory(states, positions, mask, cells, *make_maps(grids, seed))


def make_maps(grids: list[tuple[int, int]], seed: int = 0) -> tuple[list[Tensor], Tensor, list[tuple[int, int]]]:
    """Random maps of four scales, padded, the images' shares of them, and the sizes of their finest."""
    sizes = [[(n * r, n * c) for n in (4, 2, 1)] + [(-(-r // 2), -(-c // 2))] for r, c in grids]
    levels = [
        pad_maps(
            [torch.randn(*size[level], WIDTH, generator=maker(seed + sum(size[level]))).double() for size in sizes]
        )
        for level in range(4)
    ]
    shown = torch.tensor([[(c, r) for r, c in size] for size in sizes]).double()
    return levels, shown / shown.amax(0), [size[0] for size in sizes]


def maker(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_head(select_queries: bool = False, num_query_groups: int = 1, fresh: bool = False) -> DetectionHead:
    """In training mode; a fresh one's boxes are its reference boxes."""
    torch.manual_seed(0)
    head = DetectionHead(WIDTH, QUERIES, 2, 2, 2, 0.0, True, True, select_queries, select_queries, num_query_groups)
    head = head.double()
    if not fresh:
        with torch.no_grad():
            for parameter in head.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return head.train()


def assert_same(found: DetectionOutputs, expected: DetectionOutputs, tolerance: float = 0.0) -> None:
    for ours, theirs in zip([*found.aux_outputs, found], [*expected.aux_outputs, expected], strict=True):
        for name in NAMES:
            assert float((getattr(ours, name) - getattr(theirs, name)).abs().max()) <= tolerance, name


def assert_all_differ(found: DetectionOutputs, expected: DetectionOutputs) -> None:
    for ours, theirs in zip([*found.aux_outputs, found], [*expected.aux_outputs, expected], strict=True):
        assert all(bool((getattr(ours, name) != getattr(theirs, name)).all()) for name in NAMES)


def test_the_places_of_heads_by_hand():
    assert torch.allclose(compass(4), torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), atol=1e-6)
    eight = [[1.0, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]]
    assert torch.allclose(compass(8), torch.tensor(eight), atol=1e-6)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize(("width", "num_heads", "worst"), [(128, 4, 0.44), (2048, 8, 0.1)])
def test_an_equal_position_is_worth_so_much(local: bool, width: int, num_heads: int, worst: float):
    """The softmax's argument, without contents, mean of heads: of a line of places, queried from its middle.

    `worst` is that of twenty seeds. The ends of the line have the same height, so half of the worth: over 1.57 tokens
    the waves of the other direction cancel.
    """
    torch.manual_seed(0)
    attention = Attention(width, num_heads, positional=True, local=local)
    line = torch.stack([torch.linspace(0, 3.14, 11), torch.full((11,), 0.5)], dim=-1)  # in tokens
    positions = sine_embedding(line, width)[None]
    keys, _ = attention.keys_values(torch.zeros(1, 11, width), positions)
    assert attention.query_position is not None
    queries = attention.query_positions(positions[:, 5:6])
    scores = (queries @ keys[..., width // num_heads :].mT / (2 * width // num_heads) ** 0.5).mean(1).flatten()
    if local:
        assert scores.argmax() == 5 and float(scores[5]) == pytest.approx(LOCALITY, rel=worst)
        assert float((scores[0] + scores[10]) / 2) == pytest.approx(LOCALITY / 2, rel=worst)
    else:
        assert float(scores.abs().max()) < 0.25 * LOCALITY


def test_every_head_looks_from_its_own_place():
    """Positions of each head apart are what the head's rows of the projection make of them."""
    torch.manual_seed(0)
    attention = Attention(8, 2, positional=True).double()
    states, memory = torch.randn(1, 3, 8).double(), torch.randn(1, 5, 8).double()
    places, positions = torch.randn(1, 2, 3, 8).double(), torch.randn(1, 5, 8).double()
    keys_values = attention.keys_values(memory, positions)
    found = attention(states, keys_values, attention.query_positions(places))
    nn.init.eye_(attention.out.weight)
    nn.init.zeros_(attention.out.bias)
    apart = attention(states, keys_values, attention.query_positions(places))
    for head in range(2):
        rows = slice(4 * head, 4 * head + 4)
        together = attention(states, keys_values, attention.query_positions(places[:, head]))
        assert torch.allclose(apart[..., rows], together[..., rows], atol=1e-12)
        assert head == 1 or (found.shape == apart.shape and not torch.allclose(apart, together))


def test_at_first_a_query_sees_the_edge_of_its_box():
    """One head to each side: the scores of a grid's cells are highest where the head's side of the reference box is."""
    torch.manual_seed(0)
    head = DetectionHead(128, 1, 4, 1, 1, 0.0, refine_boxes=True)
    box = torch.tensor([[[0.5, 0.5, 0.4, 0.2]]])
    _, places = head._positions(torch.zeros(1, 1, 128), box, torch.tensor([[10.0, 10.0]]))
    cells = grid_cells(10, 10)
    scores = (sine_embedding(10 * cells[:, :2], 128) @ places[0, :, 0].T).T  # (heads, cells)
    seen = cells[scores.argmax(1), :2]
    assert torch.allclose(seen, torch.tensor([[0.7, 0.5], [0.5, 0.6], [0.3, 0.5], [0.5, 0.4]]), atol=0.051)


def test_the_sides_of_a_box_count_in_vision_tokens():
    """A box is the same to a query wherever the image ends."""
    torch.manual_seed(0)
    head, queries = DetectionHead(WIDTH, 1, 2, 1, 1, 0.0, refine_boxes=True).double(), torch.zeros(2, 1, WIDTH).double()
    box = torch.tensor([1.5, 2.5, 2.0, 1.0], dtype=torch.float64)  # in tokens
    grids = torch.tensor([[4.0, 4.0], [8.0, 16.0]], dtype=torch.float64)  # (columns, rows) of two images
    embedded, places = head._positions(queries, (box / grids.repeat(1, 2))[:, None], grids)
    assert torch.allclose(embedded[0], head.box_embedding(sine_embedding(box, WIDTH)), atol=1e-12)
    assert torch.allclose(embedded[0], embedded[1], atol=1e-12) and torch.allclose(places[0], places[1], atol=1e-12)


@torch.no_grad()
def test_a_layer_hands_on_where_its_boxes_are():
    """With every block silent a query gains the embedding of its box, and nothing else."""
    head, memory = make_head(), make_memory([(2, 3)], 1)
    layer = head.layers[0]
    assert isinstance(layer, DecoderLayer)
    for block in (layer.self_attention.out, layer.cross_attention.out, layer.ffn[-1]):
        assert isinstance(block, nn.Linear)
        nn.init.zeros_(block.weight)
        nn.init.zeros_(block.bias)
    queries, boxes = torch.randn(1, QUERIES, WIDTH).double(), torch.rand(1, QUERIES, 4).double()
    embedded, places = head._positions(queries, boxes, torch.tensor([[3.0, 2.0]]).double())
    assert embedded.abs().max() > 0.01
    assert torch.equal(layer(queries, embedded, places, boxes, memory, None), queries + embedded)


def test_no_gradient_flows_through_a_reference(monkeypatch: pytest.MonkeyPatch):
    """As in Deformable DETR: a layer learns to mend the boxes before it, not to make them."""
    head = make_head()
    seen: list[bool] = []
    positions = head._positions

    def recorded(queries: Tensor, references: Tensor, in_tokens: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(references.requires_grad)
        return positions(queries, references, in_tokens)

    monkeypatch.setattr(head, "_positions", recorded)
    head(make_memory([(2, 3)], 2))
    assert seen == [True, *[False] * (len(head.layers) - 1)] and len(seen) > 1  # the first are learned


@pytest.mark.parametrize("num_words", [0, 1, 5])
def test_an_image_short_of_peaks_keeps_learned_references(num_words: int):
    """One peak on a flat map with slopes: the other queries begin where a head without selection does."""
    head, memory = make_head(select_queries=True, fresh=True), make_memory([(1, 2)], num_words)
    assert head.proposal_head is not None
    with torch.no_grad():
        head.proposal_head.objectness.weight.zero_()
        proposals = head.proposal_head(memory)
        slope = torch.arange(4 * 8).double().view(1, 32)
        proposals.pred_objectness.copy_(slope)
        head.proposal_head.forward = lambda memory: proposals  # type: ignore[method-assign]
        outputs, _ = head(memory)
    # A fresh head answers with its references: the peak's box, then those that are learned.
    assert torch.allclose(outputs.pred_boxes[0, 0], proposals.pred_boxes[0, -1].clamp(1e-3, 1), atol=1e-9)
    assert torch.equal(outputs.pred_boxes[0, 1:], head.query_boxes[1:].sigmoid())


@torch.no_grad()
@pytest.mark.parametrize("train", [True, False])
def test_together_is_each_image_alone(train: bool):
    """Maps of several sizes: the proposals and every layer."""
    head = make_head(select_queries=True, num_query_groups=2).train(train)
    grids = [(1, 2), (3, 4), (2, 2)]
    together, _ = head(make_memory(grids, 3))
    assert together.proposals is not None
    for row, grid in enumerate(grids):
        alone, _ = head(make_memory([grid], 3))
        assert alone.proposals is not None
        cells = together.proposals.cells[row, :, 2] > 0
        assert int(cells.sum()) == 16 * grid[0] * grid[1]
        for name in ("cells", "pred_boxes", "pred_objectness"):
            ours, theirs = getattr(together.proposals, name)[row, cells], getattr(alone.proposals, name)[0]
            assert float((ours - theirs).abs().max()) <= (0.0 if name == "cells" else 1e-12)
        for (_, ours), (_, theirs) in zip(together.layers(), alone.layers(), strict=True):
            for name in NAMES[:2]:
                # measured: 8.9e-16
                assert float((getattr(ours, name)[row] - getattr(theirs, name)[0]).abs().max()) <= 1e-12


def test_only_their_own_loss_teaches_the_proposals():
    """The decoder takes the boxes as they are, as it takes each layer's boxes from the one before; contents learn."""
    head, memory = make_head(select_queries=True), make_memory([(3, 3)], 2)
    finest = memory.levels[0].requires_grad_()
    outputs, _ = head(memory)
    proposals, finder = outputs.proposals, head.proposal_head
    assert proposals is not None and finder is not None
    parameters = [*finder.tower.parameters(), *finder.objectness.parameters(), *finder.box.parameters()]
    decoded = outputs.pred_boxes.sum() + outputs.pred_objectness.sum()
    found = torch.autograd.grad(
        decoded, [*parameters, *finder.content.parameters()], retain_graph=True, allow_unused=True
    )
    assert found[: len(parameters)] == (None,) * len(parameters)
    assert all(part is not None and part.any() for part in found[len(parameters) :])
    own = proposals.pred_boxes.square().sum() + proposals.pred_objectness.sum()
    assert all(part.any() for part in torch.autograd.grad(own, parameters, retain_graph=True))
    (gradient,) = torch.autograd.grad(proposals.pred_objectness.sum(), finest)
    assert bool(gradient.any(-1).all())  # every cell


@torch.no_grad()
@pytest.mark.parametrize("denoised", [False, True])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_groups_do_not_see_one_another(denoised: bool, changed: int):
    """Other contents of a group move that group alone; and the denoising queries, where it is the first."""
    head, memory = make_head(num_query_groups=3), make_memory([(2, 3), (1, 2)], 2)
    target: Target = {"boxes": torch.tensor([[0.4, 0.5, 0.2, 0.3]]), "caption_ids": torch.zeros(1, 1)}
    queries = make_denoising_queries([target, target], [1, 2], 2, 0.4) if denoised else None
    before, before_denoised = head(memory, queries)
    head.query_content.weight[changed * QUERIES : (changed + 1) * QUERIES].neg_()
    after, after_denoised = head(memory, queries)
    assert len(before.groups) == 2
    for number, (old, new) in enumerate(zip([before, *before.groups], [after, *after.groups], strict=True)):
        (assert_all_differ if number == changed else assert_same)(new, old)
    if denoised:
        assert before_denoised is not None and after_denoised is not None
        (assert_all_differ if changed == 0 else assert_same)(after_denoised, before_denoised)


@torch.no_grad()
@pytest.mark.parametrize("select_queries", [False, True])
def test_the_first_group_answers(select_queries: bool):
    """In training it is what it is alone, and so it is in evaluation, without the others."""
    head, memory = make_head(select_queries, num_query_groups=3), make_memory([(2, 3), (1, 2)], 2)
    trained, evaluated = head(memory)[0], head.eval()(memory)[0]
    assert len(trained.groups) == 2 and not evaluated.groups
    # measured: 8.9e-16
    assert_same(evaluated, trained, 1e-12)
    lone = make_head(select_queries)
    whole = head.state_dict()
    cut = {name: whole[name][: len(value)] if value.dim() else whole[name] for name, value in lone.state_dict().items()}
    lone.load_state_dict(cut)
    assert_same(lone(memory)[0], trained, 1e-12)


@torch.no_grad()
def test_all_groups_begin_at_the_same_references():
    for select_queries in (False, True):
        outputs, _ = make_head(select_queries, num_query_groups=2, fresh=True)(make_memory([(3, 3)], 1))
        assert torch.equal(outputs.groups[0].pred_boxes, outputs.pred_boxes)
        assert not torch.equal(outputs.groups[0].query_features, outputs.query_features)


@torch.no_grad()
def test_each_layer_moves_boxes_by_shares_of_their_sides():
    """By hand: two layers, each a quarter of a side to the left and twice as high."""
    head = make_head(fresh=True)
    bias = head.box_deltas[-1].bias
    assert isinstance(bias, Tensor)
    bias.copy_(torch.tensor([-0.25, 0.0, 0.0, math.log(2)]))
    head.query_boxes.copy_(torch.logit(torch.tensor([0.5, 0.5, 0.4, 0.2]).double()).expand(QUERIES, 4))
    outputs, _ = head(make_memory([(2, 3)], 1))
    for layer, box in zip((outputs.aux_outputs[0], outputs), ([0.4, 0.5, 0.4, 0.4], [0.3, 0.5, 0.4, 0.8]), strict=True):
        assert torch.allclose(layer.pred_boxes, torch.tensor(box).double().expand(1, QUERIES, 4), atol=1e-6)


def test_a_head_that_moves_boxes_before_the_sigmoid_is_refused():
    """Of older versions: its numbers mean something else, and some heads have the same shapes."""
    head = make_head()
    old = {name.replace("box_deltas", "box_delta"): value for name, value in head.state_dict().items()}
    with pytest.raises(ValueError, match=r"lacks box_deltas.*or read it by the version of the recipe that wrote it"):
        fill(head, old, Path("head.safetensors"))


@pytest.fixture(scope="module")
def switched(tiny_config: Callable[..., RecipeConfig]) -> JointModel:
    return make_model(tiny_config(**ALL_SWITCHES))


@pytest.mark.parametrize("name", ["text", "empty", "unannotated", "one", "crowded"])
def test_every_parameter_learns_in_every_batch(switched: JointModel, tiny_examples: dict[str, Example], name: str):
    """`losses_and_gradients` fails where one has no gradient: other ranks would wait for it."""
    losses, gradients = losses_and_gradients(switched, make_batches([tiny_examples[name]], "packed", 1))
    assert all(bool(value.isfinite()) for value in [*losses.values(), *(g.sum() for g in gradients.values())])
    for suffix in ("", "_aux", "_proposals", "_group", "_dn"):
        assert (losses[f"loss_bbox{suffix}"] > 0) == (name in ("one", "crowded"))
        assert (losses[f"loss_objectness{suffix}"] > 0) == (
            name in ("one", "crowded") or (name == "empty" and suffix != "_dn")
        )
    if name == "one":
        still = [key for key, value in gradients.items() if "detection_head" in key and not value.any()]
        # The learned references are stand-ins where an image has peaks enough.
        assert set(still) <= {"model.detection_head.query_boxes"}
        assert all(value.any() for key, value in gradients.items() if "pyramid" in key)


@torch.no_grad()
def test_more_objects_than_queries_in_every_layer(switched: JointModel, tiny_examples: dict[str, Example]):
    """Six objects: five are matched in each layer of each group, five captions are written."""
    outputs = switched.train()(collator("standard")([tiny_examples["crowded"], tiny_examples["one"]]))
    assert len(outputs.matches) == 3 * 2
    for matches in outputs.matches:
        assert matches.image.bincount().tolist() == [NUM_QUERIES, 1]
    assert set(outputs.caption_images.tolist()) == {0, 1}
    (target,) = tiny_examples["crowded"].targets
    assert target is not None and len(target["boxes"]) == NUM_QUERIES + 1
    written: Tensor = outputs.matches[-1].target[:NUM_QUERIES]
    tokens = int((target["caption_ids"][written] != -100).sum())
    assert int((outputs.caption_images == 0).sum()) == tokens
