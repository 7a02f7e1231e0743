"""Parameter groups at the real shapes, frozen groups, learning-rate scaling and weight decay."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from recipe.config import OptimizerConfig, RecipeConfig
from recipe.estimate import model_config
from recipe.joint import JointModel
from recipe.load import build_network
from recipe.optim.groups import build_optimizer, group_of, group_parameters, lr_scale
from recipe.schema import Example, ImageSpec
from tests.support.tiny_cases import collator, make_model

IMAGE_SPEC = ImageSpec(14, 2, 3136, 12845056, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
SIZES = {"3B": (2048, 3_754_622_976), "7B": (3584, 8_292_166_656)}  # hidden size, parameters of the language model


def real_model(size: str) -> nn.Module:
    """The joint model at its real shapes, without memory for its weights."""
    hf_config = model_config(f"Qwen/Qwen2.5-VL-{size}-Instruct")
    with torch.device("meta"):
        hf_model = Qwen2_5_VLForConditionalGeneration(hf_config)
        hf_model.tie_weights()
        network = build_network(RecipeConfig(), hf_model, IMAGE_SPEC)
    model = nn.Module()
    model.model = network
    return model


@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_of_the_real_models_has_one_group(size: str):
    hidden, num_parameters = SIZES[size]
    model = real_model(size)
    groups = group_parameters(model)
    counts = {group: sum(p.numel() for _, p in members) for group, members in groups.items()}
    assert counts["vision"] + counts["merger"] + counts["llm"] == num_parameters
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert all(counts.values()) and sum(map(len, groups.values())) == len(list(model.parameters()))
    assert counts["merger"] == 1280 + (5120 + 1) * 5120 + (5120 + 1) * hidden
    # Language and vision adapter: norm, bottleneck of an eighth, no projection where the head is as wide.
    pyramid = sum(p.numel() for name, p in model.named_parameters() if name.startswith("model.memory.pyramid."))
    assert pyramid
    assert counts["adapter"] == 2 * (2 * hidden + 2 * hidden * (hidden // 8) + hidden // 8 + hidden) + pyramid
    names = dict(model.named_parameters())
    assert ("model.vlm.hf_model.lm_head.weight" in names) == (size == "7B")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_groups_by_name(prefix: str):
    """With and without the ComposerModel around the network."""
    names = {
        "vlm.hf_model.model.visual.patch_embed.proj.weight": "vision",
        "vlm.hf_model.model.visual.blocks.0.attn.qkv.weight": "vision",
        "vlm.hf_model.model.visual.merger.mlp.0.weight": "merger",
        "vlm.hf_model.model.language_model.embed_tokens.weight": "llm",
        "vlm.hf_model.lm_head.weight": "llm",
        "memory.vision_adapter.down.weight": "adapter",
        "detection_head.query_boxes": "detection",
        "caption_decoder.layers.0.cross_attention.key.weight": "detection",
    }
    assert {name: group_of(prefix + name) for name in names} == names


def test_an_unmatched_parameter_is_named(tiny_model: JointModel):
    model = nn.Module()
    model.model = tiny_model.model
    model.stranger = nn.Linear(2, 2)
    with pytest.raises(KeyError, match=r"stranger\.weight is claimed by none"):
        group_parameters(model)
    with pytest.raises(KeyError, match=r"stranger\.weight"):
        build_optimizer(model, OptimizerConfig())


def test_a_doubly_matched_parameter_is_named():
    patterns = {"everything": "weight", "heads": "head"}
    assert group_of("body.weight", patterns) == "everything"
    with pytest.raises(KeyError, match=r"head\.weight is claimed by \['everything', 'heads'\]"):
        group_of("head.weight", patterns)


def rates_of(rates: dict[str, float]) -> OptimizerConfig:
    """The rates of some groups by name, the others at their defaults."""
    keywords: dict[str, Any] = {f"lr_{group}": rate for group, rate in rates.items()}
    return OptimizerConfig(**keywords)


def step(model: JointModel, optimizer: torch.optim.Optimizer, examples: dict[str, Example]) -> None:
    batch = collator("packed")(list(examples.values()))
    model.loss(model(batch), batch)["total"].backward()
    optimizer.step()


@pytest.mark.parametrize("frozen", [("vision", "merger", "llm"), ("detection",), ("merger", "adapter")])
def test_a_rate_of_zero_freezes(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example], frozen: tuple[str, ...]
):
    """No gradient, not in the optimizer, not one bit changed by a step; everything else moves."""
    model = make_model(tiny_config())
    optimizer = build_optimizer(model, rates_of(dict.fromkeys(frozen, 0.0)))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step(model, optimizer, tiny_examples)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for group, members in group_parameters(model).items():
        for name, parameter in members:
            if group in frozen:
                assert not parameter.requires_grad and parameter.grad is None and id(parameter) not in held
                assert torch.equal(parameter, before[name]), name
            else:
                assert parameter.requires_grad and parameter.grad is not None and id(parameter) in held
                assert not torch.equal(parameter, before[name]), name
    assert len(held) == sum(p.requires_grad for p in model.parameters())


def test_a_frozen_language_model_has_no_graph(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example]
):
    model = make_model(tiny_config())
    build_optimizer(model, OptimizerConfig(lr_vision=0, lr_merger=0, lr_llm=0))
    seen: list[bool] = []
    handle = model.model.vlm.register_forward_hook(
        lambda module, arguments, states: seen.append(states.last_hidden_state.requires_grad)
    )
    model(collator("packed")([tiny_examples["two"], tiny_examples["text"]]))
    handle.remove()
    assert seen == [False]


def test_thawing_is_a_new_optimizer(tiny_config: Callable[..., RecipeConfig]):
    model = make_model(tiny_config())
    build_optimizer(model, OptimizerConfig(lr_llm=0))
    build_optimizer(model, OptimizerConfig())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rates_and_weight_decay_of_each_group(tiny_config: Callable[..., RecipeConfig]):
    """Matrices decay; biases, norms and other vectors do not."""
    model = make_model(tiny_config())
    rates = {"vision": 1e-6, "merger": 2e-6, "llm": 3e-6, "adapter": 4e-6, "detection": 5e-6}
    config = replace(rates_of(rates), weight_decay=0.3, betas=[0.8, 0.9])
    optimizer = build_optimizer(model, config)
    assert {group["name"] for group in optimizer.param_groups} == rates.keys()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["lr"] == rates[group["name"]] and group["betas"] == (0.8, 0.9)
        for parameter in group["params"]:
            assert group_of(names[id(parameter)]) == group["name"]
            assert group["weight_decay"] == (0.3 if parameter.ndim > 1 else 0.0)
    assert {0.0, 0.3} == {group["weight_decay"] for group in optimizer.param_groups}


def test_a_cpu_steps_in_one_call_per_group(tiny_config: Callable[..., RecipeConfig]):
    """Fused AdamW takes the same steps as a loop over parameters; loading a state keeps its kind."""
    trained = []
    for fused in (True, False):
        model = make_model(tiny_config()).double()
        optimizer = build_optimizer(model, OptimizerConfig(lr_llm=3e-3, lr_detection=2e-3, weight_decay=0.1))
        assert all(group["fused"] for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            group["fused"] = fused
        generator = torch.Generator().manual_seed(0)
        for step in range(6):
            if step == 3:  # as after a resume
                optimizer.load_state_dict(optimizer.state_dict())
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
        trained.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(trained[0], trained[1], rtol=0, atol=1e-14)  # measured 2.3e-16


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_rates_scale_with_the_tokens_of_a_batch(tiny_config: Callable[..., RecipeConfig], rule: str, factor: float):
    config = OptimizerConfig(lr_scaling=rule, reference_tokens=1000)
    assert lr_scale(config, 4000) == factor
    optimizer = build_optimizer(make_model(tiny_config()), config, lambda: 4000)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["llm"] == pytest.approx(1e-5 * factor) and rates["detection"] == pytest.approx(1e-4 * factor)


@pytest.mark.parametrize("missing", [{"reference_tokens": None}, {"tokens": float("nan")}, {"tokens": 0.0}])
def test_scaling_without_its_numbers_raises(missing: dict[str, Any]):
    values = {"reference_tokens": 1000, "tokens": 4000.0, **missing}
    config = OptimizerConfig(lr_scaling="linear", reference_tokens=values["reference_tokens"])
    with pytest.raises(ValueError, match=r"lr_scaling=linear needs optimizer\.reference_tokens"):
        lr_scale(config, values["tokens"])
