"""KL and loss against the base: by hand, by torch and transformers, alone or in batches, and 0 where nothing moved."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recipe.config import RecipeConfig
from recipe.models.lora import adapters, without_adapters
from recipe.models.retention import divergence_from_base
from recipe.models.token_losses import token_divergences
from recipe.schema import Example
from tests.support.tiny_cases import ADAPTED, EVERY_FAMILY, collator, make_model, token_types

CHATS = ("text", "unannotated", "in_turns", "several")  # of 0, 1, 3 and 2 images


def test_by_hand():
    """The base has probabilities 1/4 and 3/4, the model 1/2 each: KL = 1/4 ln 1/2 + 3/4 ln 3/2; label 1."""
    one = torch.ones(1, 1, dtype=torch.float64)
    base = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    found = token_divergences(one, 0 * base, one, base, torch.tensor([1]))
    expected = [0.25 * math.log(0.5) + 0.75 * math.log(1.5), math.log(2), math.log(4 / 3)]
    assert found.flatten().tolist() == pytest.approx(expected)
    assert token_divergences(one, base, one, base, torch.tensor([1]))[0].tolist() == [0.0]


def test_chunks_and_no_token():
    generator = torch.Generator().manual_seed(0)
    states, base = (torch.randn(7, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, base_weight = (torch.randn(11, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(7)
    whole = token_divergences(states, weight, base, base_weight, labels, 7)
    for chunk in (1, 3, 100):
        found = token_divergences(states, weight, base, base_weight, labels, chunk)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-14)
    assert token_divergences(states[:0], weight, base[:0], base_weight, labels[:0]).shape == (3, 0)


def test_autocast_computes_logits_in_bfloat16_and_the_rest_in_float32():
    states, base = torch.randn(5, 8), torch.randn(5, 8)
    weight, labels = torch.randn(30, 8), torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_divergences(states, weight, base, weight, labels)
        logits, base_logits = states @ weight.T, base @ weight.T
    assert found.dtype == torch.float32 and logits.dtype == torch.bfloat16
    kl = F.kl_div(logits.float().log_softmax(-1), base_logits.float().softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(found[0], kl)


def transformers_logits(vlm: Any, example: Example) -> Tensor:
    """Of the positions before an example's answer tokens, by the whole model of transformers; in order."""
    ids, hf_model, images = example.input_ids[None], vlm.hf_model, dict[str, Any]()
    if len(example.pixel_patches):
        images = {"pixel_values": vlm.normalizer(example.pixel_patches), "image_grid_thw": example.image_grid_thw}
    types = token_types(hf_model.forward, ids, hf_model.config.image_token_id)
    with torch.no_grad():
        logits = hf_model(input_ids=ids, position_ids=example.position_ids[:, None], **images, **types).logits[0]
    return logits[example.roles.nonzero()[:, 0] - 1]


@EVERY_FAMILY
def test_equal_to_kl_div_of_the_logits_of_transformers(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example]
):
    """Of two models of transformers, the second without adapters because it never had any."""
    network, base = make_model(tiny_config(**ADAPTED)).eval().model, make_model(tiny_config()).eval().model
    for name in CHATS[:2]:
        example = tiny_examples[name]
        logits, base_logits = transformers_logits(network.vlm, example), transformers_logits(base.vlm, example)
        kl = F.kl_div(logits.log_softmax(-1), base_logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        labels = example.input_ids[example.roles.nonzero()[:, 0]]
        losses = [F.cross_entropy(each, labels, reduction="none") for each in (logits, base_logits)]
        found = divergence_from_base(network, collator("packed")([example]))
        torch.testing.assert_close(found, torch.stack([kl, *losses]), rtol=0, atol=1e-12)  # measured: 1.4e-15
        assert (found[0] > 1e-3).all()


@pytest.mark.parametrize("layout", ["standard", "packed"])
def test_a_batch_is_its_samples_alone(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example], layout: str
):
    network = make_model(tiny_config(**ADAPTED)).eval().model
    alone = [divergence_from_base(network, collator("standard")([tiny_examples[name]])) for name in CHATS]
    found = divergence_from_base(network, collator(layout)([tiny_examples[name] for name in CHATS]))
    torch.testing.assert_close(found, torch.cat(alone, dim=1), rtol=1e-9, atol=1e-12)  # measured: 4.7e-15


def test_a_base_that_is_given_is_the_network_without_adapters(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example]
):
    network, base = make_model(tiny_config(**ADAPTED)).eval().model, make_model(tiny_config()).eval().model
    batch = collator("packed")([tiny_examples[name] for name in CHATS])
    torch.testing.assert_close(
        divergence_from_base(network, batch, base.vlm), divergence_from_base(network, batch), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("dora", [False, True])
def test_new_adapters_are_the_base_and_nothing_else_changes(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example], dora: bool
):
    lora = copy.deepcopy(ADAPTED["lora"])
    lora.llm.dora = dora
    network = make_model(tiny_config(**{**ADAPTED, "lora": lora})).eval().model
    weights = adapters(network.vlm.hf_model)
    moved = {name: parameter.detach().clone() for name, parameter in weights.items()}
    with torch.no_grad():
        for name, parameter in weights.items():
            if "lora_B" in name:
                parameter.zero_()
            elif "magnitude" in name:
                layer: Any = network.vlm.hf_model.get_submodule(name.partition(".lora_")[0] + ".base_layer")
                parameter.copy_(torch.linalg.vector_norm(layer.weight, dim=1))
    trained = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    batch = collator("packed")([tiny_examples[name] for name in CHATS])
    kl, loss, base_loss = divergence_from_base(network, batch)
    assert len(kl) == len(batch["labels"]) and torch.equal(loss, base_loss) and not kl.any()
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(moved[name])
    assert (divergence_from_base(network, batch)[0] > 0).all()
    assert {name: parameter.requires_grad for name, parameter in network.named_parameters()} == trained


def test_a_stage_that_froze_adapters_stays(tiny_config: Callable[..., RecipeConfig]):
    """Also if what is compared fails."""
    hf_model = make_model(tiny_config(**ADAPTED)).model.vlm.hf_model
    names = list(adapters(hf_model))
    for name in names[::2]:
        hf_model.get_parameter(name).requires_grad_(False)
    with pytest.raises(RuntimeError), without_adapters(hf_model):
        assert not any(parameter.requires_grad for parameter in adapters(hf_model).values())
        raise RuntimeError
    assert [name for name, parameter in adapters(hf_model).items() if parameter.requires_grad] == names[1::2]
