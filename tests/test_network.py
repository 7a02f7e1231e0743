"""The joint network's precision, and what its captions are trained on."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from recipe.build import build_encoder, load_processor
from recipe.config import RecipeConfig
from recipe.data.collate import collate_packed
from recipe.joint import JointModel
from recipe.losses.matcher import Matches
from recipe.network import padded_captions
from recipe.optim import build_optimizer, group_parameters
from recipe.schema import Example, Object, Target
from tests.tiny_cases import losses_and_gradients, make_batches, make_model, make_samples


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


def test_only_matched_captions_are_trained_each_in_its_objects_slot() -> None:
    """Two images: the second object of the first found no query; the second image is not annotated."""
    target = Target(boxes=torch.rand(2, 4), caption_ids=torch.tensor([[7, 8, 2], [9, 2, -100]]))
    matches = Matches(image=torch.tensor([0]), query=torch.tensor([4]), target=torch.tensor([0]))
    labels = padded_captions([target, None], matches, torch.device("cpu"))
    assert labels.tolist() == [[[7, 8, 2], [-100] * 3], [[-100] * 3] * 2]


def test_a_batch_without_objects_still_has_one_empty_slot() -> None:
    none = Matches(*torch.zeros(3, 0, dtype=torch.int64))
    assert padded_captions([None], none, torch.device("cpu")).tolist() == [[[-100]]]


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
