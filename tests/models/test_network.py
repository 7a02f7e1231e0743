"""The joint network's precision, what its captions are trained on, and what captions cost in the matching."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recipe.models.network
from recipe.build import build_encoder, load_processor
from recipe.config import RecipeConfig
from recipe.data.collate import collate_packed
from recipe.joint import JointModel
from recipe.models.caption_decoder import CaptionPlaces
from recipe.models.memory import Memory
from recipe.models.network import padded_captions
from recipe.models.sharding import Sealed
from recipe.optim.groups import build_optimizer, group_parameters
from recipe.schema import DetectionOutputs, Example, Object, Target
from tests.support.tiny_cases import (
    ALL_SWITCHES,
    NUM_QUERIES,
    losses_and_gradients,
    make_batches,
    make_model,
    make_samples,
)
from tests.support.waits import Waits


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_head_is_float32_at_least(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example], dtype: str
) -> None:
    model = make_model(tiny_config(model={"dtype": dtype}))
    assert model.model.vlm.hf_model.dtype == getattr(torch, dtype)
    batch = collate_packed([tiny_examples["two"], tiny_examples["one"]])
    outputs = model(batch)
    assert outputs.detection.pred_boxes.dtype == torch.float32
    model.loss(outputs, batch)["total"].backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_prediction_writes_no_captions_of_nothing(tiny_model: JointModel, tiny_examples: dict[str, Example]) -> None:
    """What the loss terms of an evaluation need, they still get."""
    calls: list[int] = []
    hook = tiny_model.model.caption_decoder.register_forward_hook(lambda *_: calls.append(1))
    examples = [tiny_examples["two"], replace(tiny_examples["two"], target=None)]
    with torch.no_grad():
        judged, predicted = (tiny_model.eval()(collate_packed([example])) for example in examples)
    hook.remove()
    assert len(calls) == 1
    assert torch.equal(judged.detection.pred_boxes, predicted.detection.pred_boxes)
    assert len(judged.caption_logits) and predicted.caption_logits.shape == (0, judged.caption_logits.shape[1])


class LookedUp(nn.Module):
    """A caption decoder by hand: of query features (R, 1) the hidden states are these numbers."""

    vocabulary = None

    def forward(self, features: Tensor, *others: Any) -> Tensor:
        """(R, 1) → (R, 1, 1)."""
        return features[:, None]


def caption_target(boxes: Tensor, *first_tokens: int) -> Target:
    return Target(boxes=boxes, caption_ids=torch.tensor([[token, 2] for token in first_tokens]))


def test_caption_costs_by_hand(tiny_config: Callable[..., RecipeConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of two: a query's number x gives the logits (0, x); the costs are log(1 + e^x) and that - x."""
    network = make_model(tiny_config(matcher={"cost_caption": 0.5})).model
    network.caption_decoder = LookedUp()  # type: ignore[assignment]
    monkeypatch.setattr(network.vlm, "logits", lambda hidden: torch.cat([torch.zeros_like(hidden), hidden], -1))
    features = torch.tensor([[[0.0], [math.log(3)]], [[7.0], [8.0]]])
    boxes = torch.full((2, 2, 4), 0.5)
    layer = DetectionOutputs(boxes, boxes, torch.zeros(2, 2), features)
    detection = replace(layer, aux_outputs=[layer], groups=[replace(layer, query_features=features + 1)])
    detection.selection = layer
    memory = Memory(*torch.zeros(4, 2, 1, 1))
    target = caption_target(torch.full((3, 4), 0.5), 0, 1, 0)
    target["caption_ids"][2] = -100  # a caption without any token
    costs = network._caption_costs(detection, memory, [target, None])
    assert costs.shape == (4, 2, 2, 3)  # proposals, the group's last layer, the earlier layer, the last
    ln2, ln3 = math.log(2), math.log(3)
    expected = [[0.5 * ln2, 0.5 * ln2, 0], [0.5 * 2 * ln2, 0.5 * (2 * ln2 - ln3), 0]]
    assert torch.allclose(costs[3, 0], torch.tensor(expected))
    assert torch.equal(costs[2], costs[3])
    assert costs[1, 0, 0, 0] == pytest.approx(0.5 * math.log(1 + math.e))
    assert not costs[0].any() and not costs[:, 1].any()


@pytest.mark.parametrize("switches", [{}, ALL_SWITCHES], ids=["plain", "all_switches"])
def test_every_parameter_learns_in_bfloat16(
    switches: dict[str, Any], tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example]
) -> None:
    """Autocast keeps rounded weights for the next use, also those of a use without a graph."""
    model = make_model(tiny_config(model={"dtype": "float32"}, **switches))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = losses_and_gradients(model, make_batches(list(tiny_examples.values()), "packed", 8))
    assert all(bool(loss.isfinite()) for loss in losses.values())


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("names", [["two", "text", "crowded"], ["text"]], ids="-".join)
def test_nothing_is_read_from_the_device_between_the_language_model_and_the_matching(
    tiny_config: Callable[..., RecipeConfig],
    tiny_examples: dict[str, Example],
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    is_training: bool,
) -> None:
    """A GPU would have to finish what is queued, and the host could not queue the head's pass meanwhile."""
    network = make_model(tiny_config(**{**ALL_SWITCHES, "matcher": {}})).model.train(is_training)
    batch = collate_packed([tiny_examples[name] for name in names])
    waits = Waits()
    for name in ("tolist", "cpu"):  # which the mode does not see on a CPU
        method = getattr(Tensor, name)
        counted = partial(_counted, waits, name, method)
        monkeypatch.setattr(Tensor, name, lambda tensor, counted=counted: counted(tensor))
    seen: list[Counter[str]] = []
    network.vlm.register_forward_hook(lambda *arguments: waits.seen.clear())
    matched = recipe.models.network.match
    monkeypatch.setattr(
        recipe.models.network, "match", lambda *arguments: seen.append(waits.seen.copy()) or matched(*arguments)
    )
    with waits:
        network(Sealed(batch))
    assert seen == [Counter()]
    assert waits.seen["cpu"] == (names[0] != "text")  # it does count: the matching's one copy


def _counted(waits: Waits, name: str, method: Callable[[Tensor], Any], tensor: Tensor) -> Any:
    waits.seen[name] += 1
    return method(tensor)


def test_without_auxiliary_losses_the_last_layer_alone_is_taught(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example]
) -> None:
    """Of the first group of queries, of the others and of the denoising queries."""
    model = make_model(tiny_config(detection_head={"aux_loss": False, "num_query_groups": 2, "num_layers": 3}))
    outputs = model(collate_packed([tiny_examples["two"]]))
    assert outputs.denoising is not None
    taught = (outputs.detection, *outputs.detection.groups, outputs.denoising[1])
    assert len(taught) == 3 and not any(queried.aux_outputs for queried in taught)


@torch.no_grad()
def test_caption_costs_are_those_of_one_query_after_the_other(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example]
) -> None:
    """Of every layer, image, query and object: the unlikelihood of the object's first token, teacher-forced alone."""
    network = make_model(tiny_config(**ALL_SWITCHES)).model
    names = ["two", "crowded", "empty", "unannotated"]
    outputs = network(Sealed(collate_packed([tiny_examples[name] for name in names])))
    costs = network._caption_costs(outputs.detection, outputs.memory, outputs.targets)
    layers = outputs.detection.layers()
    assert costs.shape == (len(layers), 4, NUM_QUERIES, NUM_QUERIES + 1) and not costs[0].any()
    branches = [branch for branch in [*outputs.detection.groups, outputs.detection] for _ in range(2)]
    for found, branch in zip(costs[1:], branches, strict=True):
        for row, target in enumerate(outputs.targets):
            memory = Memory(*(part[row : row + 1] for part in vars(outputs.memory).values()))
            for query in range(NUM_QUERIES):
                one = (slice(row, row + 1), query)
                places = CaptionPlaces(torch.tensor([0]), torch.tensor([0]), 1, 1)
                hidden = network.caption_decoder(
                    branch.query_features[one], branch.pred_boxes[one], places, memory, None
                )
                likelihood = network.vlm.logits(hidden[0, 0]).log_softmax(-1)
                tokens = torch.empty(0, dtype=torch.int64) if target is None else target["caption_ids"][:, 0]
                # measured: 2.6e-7 of costs up to 3, in float32
                expected = -0.5 * likelihood[tokens]
                assert torch.allclose(found[row, query, : len(tokens)].double(), expected, atol=1e-5)
                assert not found[row, query, len(tokens) :].any()


@torch.no_grad()
@pytest.mark.parametrize("cost_caption", [0.0, 0.5])
def test_equal_boxes_are_told_apart_by_their_captions(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example], cost_caption: float
) -> None:
    """Two objects of one box: with the captions swapped, the queries swap too; without the cost, boxes decide alone."""
    model = make_model(tiny_config(matcher={"cost_caption": cost_caption}))
    example = tiny_examples["two"]
    assert example.target is not None
    box = example.target["boxes"][:1].expand(2, 4)
    found = []
    for tokens in ((40, 50), (50, 40)):
        outputs = model(collate_packed([replace(example, target=caption_target(box, *tokens))]))
        for matches in outputs.matches:
            by_object = matches.query[matches.target.argsort()].tolist()
            found.append(dict(zip(tokens, by_object, strict=True)))
    half = len(found) // 2
    for before, after in zip(found[:half], found[half:], strict=True):
        assert set(before.values()) == set(after.values())
        assert (before == after) == (cost_caption > 0)


def test_captions_are_padded_each_in_its_objects_slot() -> None:
    """The second image is not annotated."""
    target = Target(boxes=torch.rand(2, 4), caption_ids=torch.tensor([[7, 8, 2], [9, 2, -100]]))
    labels = padded_captions([target, None], torch.device("cpu"))
    assert labels.tolist() == [[[7, 8, 2], [9, 2, -100]], [[-100] * 3] * 2]


def test_a_batch_without_objects_still_has_one_empty_slot() -> None:
    assert padded_captions([None], torch.device("cpu")).tolist() == [[[-100]]]


def test_only_matched_queries_are_captioned_in_training(
    tiny_model: JointModel, tiny_examples: dict[str, Example]
) -> None:
    """The captions' logits are as many as the matched captions' tokens, and depend on the matched queries alone."""
    batch = collate_packed([tiny_examples["two"], tiny_examples["crowded"], tiny_examples["empty"]])
    outputs = tiny_model(batch)
    (gradient,) = torch.autograd.grad(outputs.caption_logits.square().sum(), outputs.detection.query_features)
    matches = outputs.matches[-1]
    matched = torch.zeros(gradient.shape[:2], dtype=torch.bool)
    matched[matches.image, matches.query] = True
    assert torch.equal(gradient.any(-1), matched)
    assert matched.sum(1).tolist() == [2, gradient.shape[1], 0]
    lengths = [
        int((batch["targets"][image]["caption_ids"][target] >= 0).sum())
        for image, target in zip(matches.image.tolist(), matches.target.tolist(), strict=True)
    ]
    assert len(outputs.caption_logits) == len(outputs.caption_labels) == sum(lengths)


@pytest.mark.parametrize("names", [["two", "text"], ["text"], ["empty"]], ids="-".join)
@pytest.mark.parametrize("cost_caption", [0.0, 1.0])
def test_a_matrix_of_the_captions_own(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example], names: list[str], cost_caption: float
) -> None:
    """It is read and written with in the place of the language model's, which captions then leave alone."""
    config = tiny_config(caption_decoder={"tie_word_embeddings": False}, matcher={"cost_caption": cost_caption})
    model = make_model(config)
    decoder, vlm = model.model.caption_decoder, model.model.vlm
    assert decoder.vocabulary is not None
    assert decoder.vocabulary.weight.shape == (vlm.text_config.vocab_size, config.detection_head.width)
    assert not any(isinstance(part, torch.nn.Linear) for part in (decoder.token_in, decoder.token_out))
    (batch,) = make_batches([tiny_examples[name] for name in names], "packed", 2)
    losses_and_gradients(model, [batch])  # every parameter has a gradient in every batch
    calls = []
    handle = vlm.hf_model.lm_head.register_forward_hook(lambda *arguments: calls.append(arguments))
    outputs = model(batch)
    handle.remove()
    assert len(calls) == 1  # of the answer
    (gradient,) = torch.autograd.grad(outputs.caption_logits.square().sum(), decoder.vocabulary.weight)
    assert bool(gradient.any()) == ("two" in names)


def test_the_captions_own_matrix_learns_beside_a_frozen_language_model(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example]
) -> None:
    config = tiny_config(caption_decoder={"tie_word_embeddings": False}, optimizer={"lr_llm": 0.0})
    model = make_model(config)
    optimizer = build_optimizer(model, config.optimizer)
    groups = {name: group for group, members in group_parameters(model).items() for name, _ in members}
    assert groups["model.caption_decoder.vocabulary.weight"] == "detection"
    own, output = model.model.caption_decoder.vocabulary, model.model.vlm.hf_model.lm_head
    assert own is not None
    before = [own.weight.detach().clone(), output.weight.detach().clone()]
    (batch,) = make_batches([tiny_examples["two"]], "packed", 1)
    model.loss(model(batch), batch)["total"].backward()
    optimizer.step()
    assert not torch.equal(own.weight, before[0]) and torch.equal(output.weight, before[1])


def test_labels_of_captions_in_any_language(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example]
) -> None:
    """What the decoder is taught to write, token after token, reads as the captions, each ended once."""
    captions = ["红色的自行车", "نجمة حمراء", "👩‍🚀 in orbit"]
    config = tiny_config(caption_decoder={"max_caption_tokens": 40})
    processor = load_processor(config)
    objects = [Object((10.0 * i, 5.0, 10.0 * i + 30, 50.0), caption) for i, caption in enumerate(captions)]
    sample = replace(make_samples()["two"], objects=tuple(objects))
    outputs = make_model(config)(collate_packed([build_encoder(config, processor)(sample), tiny_examples["one"]]))
    text = processor.tokenizer.decode(outputs.caption_labels[outputs.caption_images == 0])
    end = processor.tokenizer.eos_token
    assert text.split(end) == [*captions, ""]
