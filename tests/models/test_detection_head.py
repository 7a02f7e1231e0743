"""Where queries look first, queries chosen from vision tokens, groups of queries: by hand, alone as in a batch."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from recipe.config import RecipeConfig
from recipe.joint import JointModel
from recipe.losses.terms import detection_losses
from recipe.models.detection_head import (
    NO_PROPOSAL,
    DecoderLayer,
    DetectionHead,
    QuerySelection,
    compass,
    make_denoising_queries,
)
from recipe.models.layers import LOCALITY, Attention
from recipe.models.matcher import match
from recipe.models.memory import grid_cells, sine_embedding
from recipe.schema import DetectionOutputs, Example, LossCounts, Memory, Target
from tests.support.tiny_cases import ALL_SWITCHES, NUM_QUERIES, collator, losses_and_gradients, make_batches, make_model

WIDTH, QUERIES = 16, 4
NAMES = ("pred_boxes", "pred_boxes_raw", "pred_objectness", "query_features")
COUNTS = LossCounts(teacher_tokens=1, student_tokens=1, objects=1, images=1, microbatches=1)


def make_memory(grids: list[tuple[int, int]], num_words: int, seed: int = 0) -> Memory:
    """Random tokens of images of (rows, columns), each followed by words; an image's own, whatever stands beside it."""
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
    positions = sine_embedding(cells[..., :2], WIDTH) * (cells[..., 2:3] > 0)
    return Memory(states, positions, mask, cells)


def make_head(select_queries: bool = False, num_query_groups: int = 1, fresh: bool = False) -> DetectionHead:
    """In training mode; a fresh one's boxes are its reference boxes."""
    torch.manual_seed(0)
    switches = {"select_queries": select_queries, "num_query_groups": num_query_groups}
    head = DetectionHead(WIDTH, QUERIES, 2, 2, 2, 0.0, refine_boxes=True, **switches).double()
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
@pytest.mark.parametrize(("width", "num_heads", "worst"), [(128, 4, 0.27), (2048, 8, 0.06)])
def test_an_equal_position_is_worth_so_much(local: bool, width: int, num_heads: int, worst: float):
    """The softmax's argument, without contents, mean of heads: of a line of places, queried from its middle.

    `worst` is that of twenty seeds. The ends of the line have the same height, so half of the worth.
    """
    torch.manual_seed(0)
    attention = Attention(width, num_heads, positional=True, local=local)
    line = torch.stack([torch.linspace(0, 1, 11), torch.full((11,), 0.5)], dim=-1)
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
    box = torch.logit(torch.tensor([[[0.5, 0.5, 0.4, 0.2]]]))
    _, places = head._positions(torch.zeros(1, 1, 128), box)
    cells = grid_cells(10, 10)
    scores = (sine_embedding(cells[:, :2], 128) @ places[0, :, 0].T).T  # (heads, cells)
    seen = cells[scores.argmax(1), :2]
    assert torch.allclose(seen, torch.tensor([[0.7, 0.5], [0.5, 0.6], [0.3, 0.5], [0.5, 0.4]]), atol=0.051)


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
    queries, references = torch.randn(1, QUERIES, WIDTH).double(), torch.randn(1, QUERIES, 4).double()
    boxes, places = head._positions(queries, references)
    assert boxes.abs().max() > 0.01
    assert torch.equal(layer(queries, boxes, places, memory, None), queries + boxes)


class Judged(QuerySelection):
    """Whose logit is the first number of a token, and whose boxes are their cells', three times as large."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.inputs, self.norm = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        with torch.no_grad():
            self.objectness.weight.zero_()
            self.objectness.weight[0, 0] = 1
            self.objectness.bias.zero_()
        self.double()


def test_no_gradient_flows_through_a_reference(monkeypatch: pytest.MonkeyPatch):
    """As in Deformable DETR: a layer learns to mend the boxes before it, not to make them."""
    head = make_head()
    seen: list[bool] = []
    positions = head._positions

    def recorded(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(references.requires_grad)
        return positions(queries, references)

    monkeypatch.setattr(head, "_positions", recorded)
    head(make_memory([(2, 3)], 2))
    assert seen == [True, *[False] * (len(head.layers) - 1)] and len(seen) > 1  # the first are learned


def test_selection_by_hand():
    """Three queries; four tokens side by side, and two, with padding and two words that nothing may choose."""
    cells = torch.zeros(2, 6, 4, dtype=torch.float64)
    cells[0, :4], cells[1, :2] = grid_cells(1, 4), grid_cells(1, 2)
    tokens = torch.zeros(2, 6, WIDTH, dtype=torch.float64)
    tokens[0, :, 0] = torch.tensor([1, 3, 0, 2, 9, 9])
    tokens[1, :, 0] = torch.tensor([-7, -6, 9, 9, 9, 9])
    memory = Memory(tokens, torch.zeros_like(tokens), torch.ones(2, 6).bool(), cells)
    spare = torch.arange(12.0, dtype=torch.float64).view(1, 3, 4).expand(2, -1, -1) / 10
    found = Judged()(memory, spare)
    assert found.pred_objectness.tolist() == [[3, 2, 1], [-6, -7, NO_PROPOSAL]]
    most = 0.999  # a side of 1 has no logit
    expected = [[[0.375, 0.5, 0.75, most], [0.875, 0.5, 0.75, most], [0.125, 0.5, 0.75, most]]]
    expected += [[[0.75, 0.5, most, most], [0.25, 0.5, most, most], spare[0, 2].sigmoid().tolist()]]
    assert torch.allclose(found.pred_boxes, torch.tensor(expected, dtype=torch.float64), atol=1e-7)
    assert torch.equal(found.pred_boxes, found.pred_boxes_raw.sigmoid())
    assert found.query_features.shape == (2, 3, WIDTH)


@pytest.mark.parametrize("num_words", [0, 1, 5])
def test_an_image_short_of_tokens_keeps_learned_references(num_words: int):
    """Two tokens for four queries, also where the whole memory is shorter than the queries are many."""
    head = make_head(select_queries=True, fresh=True)
    outputs, _ = head(make_memory([(1, 2)], num_words))
    assert outputs.selection is not None
    assert torch.equal(outputs.selection.pred_boxes_raw[0, 2:], head.query_boxes[2:])
    assert (outputs.selection.pred_objectness[0] == NO_PROPOSAL).tolist() == [False, False, True, True]
    assert outputs.selection.query_features.shape == (1, QUERIES, WIDTH)
    # A fresh head answers with its references: the chosen proposals.
    assert torch.equal(outputs.pred_boxes_raw, outputs.selection.pred_boxes_raw)


def test_logits_that_are_not_finite_choose_no_word():
    memory = make_memory([(1, 2), (2, 2)], 3)
    memory.tokens[0] = math.nan
    with torch.no_grad():
        selection = make_head(select_queries=True)(memory)[0].selection
    assert selection is not None
    assert (selection.pred_objectness[0, 2:] == NO_PROPOSAL).all() and selection.pred_boxes[0, 2:].isfinite().all()
    assert selection.pred_objectness[1].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("train", [True, False])
def test_together_is_each_image_alone(train: bool):
    """Fewer tokens than queries beside more."""
    head = make_head(select_queries=True, num_query_groups=2).train(train)
    grids = [(1, 2), (3, 4), (2, 2)]
    together, _ = head(make_memory(grids, 3))
    for row, grid in enumerate(grids):
        alone, _ = head(make_memory([grid], 3))
        for (_, ours), (_, theirs) in zip(together.layers(), alone.layers(), strict=True):
            for name in NAMES[:3]:
                # measured: 8.9e-16
                assert float((getattr(ours, name)[row] - getattr(theirs, name)[0]).abs().max()) <= 1e-12


def test_only_its_own_loss_teaches_the_selection():
    """The decoder takes the proposals as they are, as it takes each layer's boxes from the one before."""
    head, memory = make_head(select_queries=True), make_memory([(3, 3)], 2)
    memory.tokens.requires_grad_()
    outputs, _ = head(memory)
    selection = outputs.selection
    assert selection is not None and head.selection is not None
    parameters = list(head.selection.parameters())
    decoded = outputs.pred_boxes.sum() + outputs.pred_objectness.sum()
    assert torch.autograd.grad(decoded, parameters, retain_graph=True, allow_unused=True) == (None,) * len(parameters)
    for gradient in torch.autograd.grad(selection.pred_boxes.sum() + selection.pred_objectness.sum(), parameters):
        assert gradient.abs().max() > 0
    (gradient,) = torch.autograd.grad(
        head(memory)[0].selection.pred_objectness.sum(),  # pyright: ignore[reportOptionalMemberAccess]
        memory.tokens,
    )
    assert int(gradient.abs().sum(-1).gt(0).sum()) == QUERIES  # the chosen tokens, no other


def test_selection_terms_by_hand():
    """The proposals are a layer of their own, matched to the objects by themselves."""
    head = make_head(select_queries=True, fresh=True)
    outputs, _ = head(make_memory([(3, 3)], 2))
    selection = outputs.selection
    assert selection is not None
    truth = selection.pred_boxes.detach()[0, [2]] + torch.tensor([0.01, 0, 0, 0])
    targets: list[Target | None] = [{"boxes": truth, "caption_ids": torch.zeros(1, 1, dtype=torch.int64)}]
    layers = outputs.layers()
    assert [name for name, _ in layers] == ["_selection", "_aux", ""] and layers[0][1] is selection
    matches = match([layer for _, layer in layers], targets, 5, 2, 0)
    assert matches[0].query.tolist() == [2]
    terms = detection_losses(outputs, matches, targets, COUNTS, RecipeConfig().loss)
    assert float(terms["loss_bbox_selection"].detach()) == pytest.approx(0.01)


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
    cut = {name: whole[name][: len(value)] for name, value in lone.state_dict().items()}
    lone.load_state_dict(cut)
    assert_same(lone(memory)[0], trained, 1e-12)


@torch.no_grad()
def test_all_groups_begin_at_the_same_references():
    for select_queries in (False, True):
        outputs, _ = make_head(select_queries, num_query_groups=2, fresh=True)(make_memory([(3, 3)], 1))
        assert torch.equal(outputs.groups[0].pred_boxes, outputs.pred_boxes)
        assert not torch.equal(outputs.groups[0].query_features, outputs.query_features)


@pytest.fixture(scope="module")
def switched(tiny_config: Callable[..., RecipeConfig]) -> JointModel:
    return make_model(tiny_config(**ALL_SWITCHES))


@pytest.mark.parametrize("name", ["text", "empty", "unannotated", "one", "crowded"])
def test_every_parameter_learns_in_every_batch(switched: JointModel, tiny_examples: dict[str, Example], name: str):
    """`losses_and_gradients` fails where one has no gradient: other ranks would wait for it."""
    losses, gradients = losses_and_gradients(switched, make_batches([tiny_examples[name]], "packed", 1))
    assert all(bool(value.isfinite()) for value in [*losses.values(), *(g.sum() for g in gradients.values())])
    for suffix in ("", "_aux", "_selection", "_group", "_dn"):
        assert (losses[f"loss_bbox{suffix}"] > 0) == (name in ("one", "crowded"))
        assert (losses[f"loss_objectness{suffix}"] > 0) == (
            name in ("one", "crowded") or (name == "empty" and suffix != "_dn")
        )
    if name == "one":
        still = [key for key, value in gradients.items() if "detection_head" in key and not value.any()]
        # The learned references of groups are stand-ins where a picture has tokens enough.
        assert set(still) <= {"model.detection_head.query_boxes"}
        assert gradients["model.memory.patch_adapter.down.weight"].any()


@torch.no_grad()
def test_more_objects_than_queries_in_every_layer(switched: JointModel, tiny_examples: dict[str, Example]):
    """Six objects: five are matched in each layer of each group and among the proposals, five captions are written."""
    outputs = switched.train()(collator("standard")([tiny_examples["crowded"], tiny_examples["one"]]))
    assert len(outputs.matches) == 1 + 3 * 2
    for matches in outputs.matches:
        assert matches.image.bincount().tolist() == [NUM_QUERIES, 1]
    assert set(outputs.caption_images.tolist()) == {0, 1}
    (target,) = tiny_examples["crowded"].targets
    assert target is not None and len(target["boxes"]) == NUM_QUERIES + 1
    written: Tensor = outputs.matches[-1].target[:NUM_QUERIES]
    tokens = int((target["caption_ids"][written] != -100).sum())
    assert int((outputs.caption_images == 0).sum()) == tokens
