"""A frozen language model in nf4: what a layer stores and computes, and that the model is one of rounded weights."""

import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn

from recipe.algorithms.snapshot import Snapshot, weights_are_finite
from recipe.checkpoints.base import base_weights, fingerprint
from recipe.checks import check_nf4
from recipe.config import ConfigError, LoraConfig, LoraPartConfig, ModelConfig, OptimizerConfig, RecipeConfig
from recipe.load import load_base
from recipe.models import nf4
from recipe.models.lora import adapters, add_adapters
from recipe.models.nf4 import Nf4Linear, bfloat16_sum, nf4_layers, num_weights, plain_shapes, store_in_nf4
from recipe.optim.groups import build_optimizer
from recipe.schema import Example
from tests.support.tiny_cases import (
    ADAPTED,
    IN_NF4,
    gradient_error,
    loss_error,
    losses_and_gradients,
    make_batches,
    make_model,
)

# The 16 values of nf4 (appendix E of QLoRA).
VALUES = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def linear(weight: Tensor) -> nn.Linear:
    """A layer of that weight and no bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def test_a_layer_by_hand() -> None:
    """Two rows of a block each, of scales 1 and 3: their mean is 2, and they are -1 and 1 times 1 away from it.

    The 8-bit values closest to -1 and 1 are -0.99297 and 1, so the scales become 1.00703 and 3.
    """
    near = torch.tensor([*VALUES, *(value + 0.01 for value in VALUES[:-1]), *VALUES, *VALUES, 0.0])
    stored = Nf4Linear(linear(torch.stack([near, 3 * near])))
    codes = torch.tensor([*range(16), *range(15), *range(16), *range(16), 7], dtype=torch.uint8)
    pairs = (codes[0::2] * 16 + codes[1::2])[:, None]
    assert torch.equal(stored.nf4_packed, torch.cat([pairs, pairs]))
    assert (float(stored.nf4_offset), stored.nf4_scale.tolist()) == (2.0, [1.0])
    expected = torch.tensor([[2 - 0.99296875], [3.0]]) * torch.tensor(VALUES)[codes.int()]
    assert torch.equal(stored.weight, expected.to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(64, 64), (128, 96), (200, 300), (64, 65), (3, 5), (1, 1)])
def test_weights_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    """Of any shape: blocks that reach into the next row, a last one that is shorter, half a byte."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored = Nf4Linear(linear(weight))
    expected = dequantize_4bit(*quantize_4bit(weight.bfloat16(), compress_statistics=True, quant_type="nf4"))
    assert stored.weight.dtype == torch.bfloat16 and torch.equal(stored.weight, expected)
    on_meta = Nf4Linear(linear(weight.to("meta")))
    assert [(name, part.shape, part.dtype) for name, part in on_meta.named_parameters()] == [
        (name, part.shape, part.dtype) for name, part in stored.named_parameters()
    ]
    assert on_meta.weight.shape == shape and on_meta.weight.is_meta
    assert sum(num_weights(f"llm.{name}", part) for name, part in stored.named_parameters()) in (
        weight.numel(),
        weight.numel() + 1,
    )


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_equal_weights_stay_equal(value: float) -> None:
    weight = torch.full((96, 64), value)
    assert torch.equal(Nf4Linear(linear(weight)).weight, weight.bfloat16())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_product_is_that_with_the_rounded_weight(dtype: str) -> None:
    """In the precision of the input; forward and backward keep no weight, and an evaluation between changes nothing."""
    torch.manual_seed(0)
    plain = nn.Linear(96, 80).to(getattr(torch, dtype))
    stored = Nf4Linear(deepcopy(plain))
    plain.weight.data = stored.weight.to(plain.weight.dtype)
    rows = torch.randn(3, 7, 96, dtype=plain.weight.dtype)
    kept: list[Tensor] = []
    results = []
    for layer in (plain, stored, stored):
        read = rows.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
            kept.clear()
            product = layer(read)
        product.square().sum().backward()
        results.append((product.detach(), read.grad))
        with torch.no_grad():
            assert torch.equal(layer.eval()(rows), product)
        layer.train()
    assert not kept
    (expected, gradient), *others = results
    assert all(torch.equal(found, expected) and torch.equal(own, gradient) for found, own in others)


def test_a_product_under_autocast() -> None:
    stored = Nf4Linear(nn.Linear(64, 64, dtype=torch.bfloat16))
    read = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        product = stored(read)
    product.sum().backward()
    assert product.dtype == torch.bfloat16 and read.grad is not None and read.grad.dtype == torch.float32
    expected = torch.ones(5, 64, dtype=torch.bfloat16) @ stored.weight
    assert torch.equal(read.grad, expected.float())


def test_a_layer_survives_copies_and_state_dicts() -> None:
    first, second = Nf4Linear(nn.Linear(70, 50)), Nf4Linear(nn.Linear(70, 50))
    assert torch.equal(deepcopy(first).weight, first.weight) and not torch.equal(first.weight, second.weight)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.weight, first.weight)
    assert not any(part.requires_grad for name, part in first.named_parameters() if name != "bias")


def test_what_is_stored(tiny_config: Callable[..., RecipeConfig]) -> None:
    """The 14 linear layers of two blocks; token embedding, norms, biases and vision tower keep 16 bits."""
    config = tiny_config(model={"frozen_dtype": "nf4", "dtype": "float32"}, optimizer={"lr_llm": 0.0, "lr_vision": 0.0})
    vlm: Any = load_base(config)
    assert len(nf4_layers(vlm.model.language_model.layers)) == len(nf4_layers(vlm)) == 2 * 7
    dtypes = {name: parameter.dtype for name, parameter in vlm.named_parameters() if ".nf4_" not in name}
    assert not any("proj.weight" in name for name in dtypes if "language_model" in name)
    assert {dtype for name, dtype in dtypes.items() if ".merger." not in name} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if ".merger." in name} == {torch.float32}  # it is trained
    assert vlm.dtype == torch.bfloat16 and vlm.lm_head.weight is vlm.get_input_embeddings().weight
    trained = load_base(replace(config, optimizer=replace(config.optimizer, lr_llm=1e-4)))
    assert not nf4_layers(trained)


def test_one_weight_at_a_time_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is stored, the memory of those before it is free."""
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    alive = [weakref.ref(layer.weight) for layer in layers if isinstance(layer, nn.Linear)]
    counts: list[int] = []

    def watched(weight: Tensor, _quantize: Any = nf4._quantize) -> dict[str, Tensor]:
        counts.append(sum(ref() is not None for ref in alive))
        return _quantize(weight)

    monkeypatch.setattr(nf4, "_quantize", watched)
    store_in_nf4(layers)
    assert counts == [3, 2, 1]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_new_adapters_change_nothing(tiny_config: Callable[..., RecipeConfig], dtype: str, dora: bool) -> None:
    """On the stored weights; they begin with the numbers that they have on the weights in bfloat16."""
    off: dict[str, Any] = {"optimizer": {"lr_llm": 0.0, "lr_vision": 0.0, "lr_merger": 0.0}}
    logits, starts = [], []
    for frozen_dtype, adapted in (("nf4", False), ("nf4", True), ("bfloat16", True)):
        vlm: Any = load_base(tiny_config(model={"frozen_dtype": frozen_dtype, "dtype": dtype}, **off)).eval()
        if adapted:
            torch.manual_seed(0)
            own = torch.promote_types(vlm.dtype, torch.float32)
            add_adapters(vlm, {"llm": LoraPartConfig(rank=4, dora=dora)}, own)
            starts.append({name: p.detach() for name, p in adapters(vlm).items() if "lora_A" in name})
        with torch.no_grad():
            logits.append(vlm(input_ids=torch.arange(20)[None]).logits)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[1], logits[2])
    if dtype != "float64":  # there the weights below are not in bfloat16, and the start is not rounded to it
        assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())


def test_the_model_is_one_of_the_rounded_weights(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example]
) -> None:
    """Every loss and gradient, with adapters of both kinds; float64."""
    stored, plain = make_model(tiny_config(**IN_NF4)), make_model(tiny_config(**ADAPTED))
    layers = dict(stored.named_modules())
    with torch.no_grad():
        own = dict(stored.named_parameters())
        for name, parameter in plain.named_parameters():
            layer = layers[name.rpartition(".")[0]]
            weight = layer.weight if isinstance(layer, Nf4Linear) and name.endswith(".weight") else own[name]
            parameter.copy_(weight)
    batches = make_batches([tiny_examples[name] for name in ("two", "text", "one")], "packed", 2)
    expected, found = (losses_and_gradients(model, batches) for model in (plain, stored))
    assert sum("lora_" in name for name in found[1]) == 2 * 7 * 3 + 2 * 2 * 2
    assert loss_error(found[0], expected[0]) <= 1e-12  # measured: 0
    assert gradient_error(found[1], expected[1]) <= 1e-12  # measured: 0


def test_it_names_the_base_it_was_made_from(tiny_config: Callable[..., RecipeConfig]) -> None:
    """By fingerprint and shapes, as the same run with weights in bfloat16 does."""
    changes: dict[str, Any] = {"dtype": "float32"}
    rates = {"lr_llm": 0.0, "lr_vision": 0.0, "lr_merger": 0.0}
    configs = [
        tiny_config(**{**ADAPTED, "optimizer": rates, "model": {**changes, "frozen_dtype": dtype}})
        for dtype in ("nf4", "bfloat16")
    ]
    stored, rounded = (make_model(config).model for config in configs)
    found, expected = base_weights(stored, configs[0]), base_weights(rounded, configs[1])
    assert fingerprint(found) == fingerprint(expected)
    shapes, known = (plain_shapes(dict(network.named_parameters())) for network in (stored, rounded))
    assert shapes == known and list(sorted(shapes)) == sorted(known)
    # Another value in one weight is another base.
    layer = nf4_layers(stored)[3]
    layer.nf4_source[2] += 1
    assert fingerprint(base_weights(stored, configs[0])) != fingerprint(expected)
    weight = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    assert Nf4Linear(linear(weight)).nf4_source.tolist() == [2, 2, bfloat16_sum(weight)]


def test_a_snapshot_holds_what_is_trained(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example]
) -> None:
    """Taken, spoiled by a NaN and restored: the bits are back, those in nf4 never moved."""
    config = tiny_config(**IN_NF4)
    model = make_model(config)
    optimizer = build_optimizer(model, config.optimizer)
    (batch,) = make_batches([tiny_examples["one"]], "packed", 1)

    def step() -> None:
        losses_and_gradients(model, [batch])
        optimizer.step()

    class State:  # what the snapshot reads of Composer's
        timestamp = type("Timestamp", (), {"batch": 1})

    state: Any = State()
    state.model, state.optimizers = model, [optimizer]
    step()
    snapshot = Snapshot()
    snapshot.take(state)
    assert not any(".nf4_" in name for name in snapshot._copies)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step()
    with torch.no_grad():
        next(iter(adapters(model.model.vlm.hf_model).values())).fill_(float("nan"))
    assert not weights_are_finite(state)
    snapshot.restore(state)
    assert weights_are_finite(state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, r"frozen_dtype is nf4, but optimizer\.lr_llm is 1e-05, so nothing .* set optimizer\.lr_llm=0 \(lora"),
        (
            {
                "optimizer": OptimizerConfig(lr_llm=0.0),
                "trainer": {"parallelism_config": {"fsdp": {}}},
                "lora": LoraConfig(llm=LoraPartConfig()),
            },
            r"nf4 with trainer\.parallelism_config\.fsdp, .* set trainer\.parallelism_config=null, or .*=same",
        ),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], expected: str) -> None:
    config = RecipeConfig(model=ModelConfig(frozen_dtype="nf4"))
    with pytest.raises(ConfigError, match=expected):
        check_nf4(replace(config, **changes))
    check_nf4(replace(config, optimizer=OptimizerConfig(lr_llm=0.0)))


def test_without_bitsandbytes_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipe.models.nf4.find_spec", lambda name: None)
    check_nf4(RecipeConfig())
    expected = r"nf4 needs bitsandbytes, .* pip install -e '\.\[bitsandbytes\]', or set model\.frozen_dtype=bfloat16"
    with pytest.raises(ConfigError, match=expected):
        check_nf4(RecipeConfig(model=ModelConfig(frozen_dtype="nf4")))
    with pytest.raises(ConfigError, match=expected):
        store_in_nf4(nn.Sequential(nn.Linear(2, 2)))
