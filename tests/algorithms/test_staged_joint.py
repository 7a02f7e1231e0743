"""Stages of the joint model: two stages are two runs, resuming is exact, and what frozen parts teach and keep."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipe.config import OptimizerConfig, RecipeConfig, SchedulerConfig
from recipe.joint import JointModel
from recipe.optim.groups import build_optimizer, group_of
from recipe.schema import Example
from tests.support.staged_cases import (
    ADAPTED_RATES,
    MANY_STAGES,
    RATES,
    TWO_STAGES,
    adapted,
    by_hand,
    config_with,
    differing,
    make_steps,
    parts_of,
    train,
)
from tests.support.tiny_cases import ADAPTED, collator, make_model

COSINE = SchedulerConfig("cosine", "2ba", 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("with_adapters", [False, True])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_two_stages_are_two_runs_by_hand(
    tiny_config: Callable[..., RecipeConfig],
    tiny_examples: dict[str, Example],
    gradient_checkpointing: bool,
    with_adapters: bool,
):
    """The joint model, whose embedding is tied to the output matrix; bit for bit, Adam state too."""
    config = tiny_config(model={"gradient_checkpointing": gradient_checkpointing}, **(ADAPTED if with_adapters else {}))
    stages, rates = (adapted(TWO_STAGES), ADAPTED_RATES) if with_adapters else (TWO_STAGES, RATES)
    steps = make_steps(tiny_examples)
    trainer = train(make_model(config), steps, "2ep", config_with(stages, rates=rates))
    expected = by_hand(make_model(config), make_model(config), steps, rates=rates)
    assert differing(parts_of(trainer.state), expected) == []


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "with_adapters"), [(2, False), (3, False), (6, False), (7, False), (6, True)])
def test_the_joint_model_resumes_bit_for_bit(
    tiny_config: Callable[..., RecipeConfig],
    tiny_examples: dict[str, Example],
    tmp_path: Path,
    batch: int,
    with_adapters: bool,
):
    config, stages, steps = tiny_config(), config_with(MANY_STAGES, COSINE), make_steps(tiny_examples)
    if with_adapters:
        config, stages = tiny_config(**ADAPTED), config_with(adapted(MANY_STAGES), COSINE, ADAPTED_RATES)
    saving: dict[str, Any] = {"save_folder": str(tmp_path), "save_interval": "1ba", "save_filename": "ba{batch}.pt"}
    whole = train(make_model(config), steps, "2ep", stages, **saving)
    resumed = train(make_model(config), steps, "2ep", stages, load_path=str(tmp_path / f"ba{batch}.pt"))
    assert differing(parts_of(resumed.state), parts_of(whole.state)) == []


def freeze(model: JointModel, *frozen: str) -> None:
    rates: dict[str, Any] = {f"lr_{group}": 0.0 for group in frozen}
    build_optimizer(model, OptimizerConfig(**rates))


def test_a_frozen_head_teaches_nothing_but_tells_its_losses(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example]
):
    """The gradient is that of the language losses alone; with a trainable adapter it is not."""
    batch = collator("packed")([tiny_examples["one"], tiny_examples["text"]])

    def gradient(*frozen: str, weight: float = 1.0) -> tuple[dict[str, Tensor], Tensor]:
        loss = {f"weight_{name}": weight for name in ("bbox", "giou", "objectness", "caption")}
        model = make_model(tiny_config(loss=loss))
        freeze(model, *frozen)
        terms = model.loss(model(batch), batch)
        terms["total"].backward()
        assert all((p.grad is None) == (group_of(name) in frozen) for name, p in model.named_parameters())
        merger = model.get_parameter("model.vlm.hf_model.model.visual.merger.mlp.0.weight")
        assert merger.grad is not None
        return terms, merger.grad

    terms, frozen = gradient("adapter", "detection")
    whole, without = gradient(weight=0.0)
    assert torch.equal(frozen, without)
    assert terms.keys() == whole.keys() and all(
        torch.equal(terms[name], whole[name]) for name in set(terms) - {"total"}
    )
    assert not torch.equal(gradient("detection")[1], without)


REGIONS = {"vision": "vlm.hf_model.model.visual", "llm": "vlm.hf_model.model.language_model", "head": ""}


def saved_bytes(model: JointModel, example: Example) -> dict[str, int]:
    """Bytes that autograd keeps for the backward pass, weights apart, by the part of the model that made them."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    regions, kept = ["head"], dict.fromkeys(REGIONS, 0)

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[regions[-1]] += tensor.nbytes
        return tensor

    for region, name in REGIONS.items():
        if name:
            module = model.model.get_submodule(name)
            module.register_forward_pre_hook(lambda *_, region=region: regions.append(region))
            module.register_forward_hook(lambda *_: regions.pop() and None)
    batch = collator("packed")([example])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.loss(model(batch), batch)
    return kept


def test_no_graph_is_kept_below_what_is_frozen(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example]
):
    def kept(*frozen: str) -> dict[str, int]:
        model = make_model(tiny_config())
        freeze(model, *frozen)
        return saved_bytes(model, tiny_examples["one"])

    every = kept()
    assert all(every.values())
    without_vision = kept("vision", "merger")
    assert without_vision["vision"] == 0 and 0 < without_vision["llm"] <= every["llm"]
    assert kept("vision")["vision"] < 0.2 * every["vision"]  # the merger's
    only_head = kept("vision", "merger", "llm")
    assert only_head["vision"] == only_head["llm"] == 0 < only_head["head"]
    without_head = kept("adapter", "detection")
    assert without_head["vision"] == every["vision"] and without_head["llm"] == every["llm"]
    assert without_head["head"] < 0.2 * every["head"]  # the output matrix's
