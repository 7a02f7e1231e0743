"""The joint network's precision, and what its captions are trained on."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import recipe.models.network
from recipe.config import RecipeConfig
from recipe.data.collate import collate_packed, one_each
from recipe.joint import JointModel
from recipe.load import load_processor
from recipe.models.network import Sealed, padded_captions
from recipe.schema import Example, Object, Target
from tests.support.tiny_cases import (
    ALL_SWITCHES,
    losses_and_gradients,
    make_batches,
    make_encoder,
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
    batch = collate_packed(one_each([tiny_examples["two"], tiny_examples["one"]]))
    outputs = model(batch)
    assert outputs.detection.pred_boxes.dtype == torch.float32
    model.loss(outputs, batch)["total"].backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_prediction_writes_no_captions_of_nothing(tiny_model: JointModel, tiny_examples: dict[str, Example]) -> None:
    """What the loss terms of an evaluation need, they still get."""
    calls: list[int] = []
    hook = tiny_model.model.caption_decoder.register_forward_hook(lambda *_: calls.append(1))
    examples = [tiny_examples["two"], replace(tiny_examples["two"], targets=[None])]
    with torch.no_grad():
        judged, predicted = (tiny_model.eval()(collate_packed(one_each([example]))) for example in examples)
    hook.remove()
    assert len(calls) == 1
    assert torch.equal(judged.detection.pred_boxes, predicted.detection.pred_boxes)
    assert len(judged.caption_losses) and not len(predicted.caption_losses)


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
    network = make_model(tiny_config(**ALL_SWITCHES)).model.train(is_training)
    batch = collate_packed(one_each([tiny_examples[name] for name in names]))
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
    outputs = model(collate_packed(one_each([tiny_examples["two"]])))
    assert outputs.denoising is not None
    taught = (outputs.detection, *outputs.detection.groups, outputs.denoising[1])
    assert len(taught) == 3 and not any(queried.aux_outputs for queried in taught)


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
    batch = collate_packed(one_each([tiny_examples["two"], tiny_examples["crowded"], tiny_examples["empty"]]))
    outputs = tiny_model(batch)
    (gradient,) = torch.autograd.grad(outputs.caption_losses.square().sum(), outputs.detection.query_features)
    matches = outputs.matches[-1]
    matched = torch.zeros(gradient.shape[:2], dtype=torch.bool)
    matched[matches.image, matches.query] = True
    assert torch.equal(gradient.any(-1), matched)
    assert matched.sum(1).tolist() == [2, gradient.shape[1], 0]
    lengths = [
        int((batch["targets"][image]["caption_ids"][target] >= 0).sum())
        for image, target in zip(matches.image.tolist(), matches.target.tolist(), strict=True)
    ]
    assert len(outputs.caption_losses) == len(outputs.caption_labels) == sum(lengths)


def test_labels_of_captions_in_any_language(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example]
) -> None:
    """What the decoder is taught to write, token after token, reads as the captions, each ended once."""
    captions = ["红色的自行车", "نجمة حمراء", "👩‍🚀 in orbit"]
    config = tiny_config(caption_decoder={"max_caption_tokens": 40})
    processor = load_processor(config.model.pretrained_model_name_or_path)
    objects = [Object((10.0 * i, 5.0, 10.0 * i + 30, 50.0), caption) for i, caption in enumerate(captions)]
    sample = replace(make_samples()["two"], objects=tuple(objects))
    examples = [make_encoder(config)(sample), tiny_examples["one"]]
    outputs = make_model(config)(collate_packed(one_each(examples)))
    text = processor.tokenizer.decode(outputs.caption_labels[outputs.caption_images == 0])
    end = processor.tokenizer.eos_token
    assert sorted(text.split(end)) == sorted([*captions, ""])  # in the order of the queries
