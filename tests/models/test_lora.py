"""Adapters by peft: where they sit, what they compute, what they are merged into, and what peft reads of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recipe.checks import check_adapters
from recipe.config import ConfigError, LoraConfig, LoraPartConfig, OptimizerConfig, RecipeConfig, groups_of
from recipe.families import FAMILIES
from recipe.models.lora import (
    WEIGHTS_FILE,
    adapters,
    add_adapters,
    load_adapters,
    merge_adapters,
    peft_config,
    save_adapters,
)
from recipe.models.vlm import load_vlm
from recipe.optim.groups import build_optimizer, group_of, group_parameters
from tests.support.tiny_cases import ADAPTED, OTHER_FAMILIES, make_model

PARTS = {"llm": LoraPartConfig(rank=4), "vision": LoraPartConfig(rank=2, alpha=3.0, targets=["qkv", "down_proj"])}
DORA = {part: LoraPartConfig(**{**vars(config), "dora": True}) for part, config in PARTS.items()}
BOTH = pytest.mark.parametrize("parts", [PARTS, DORA], ids=["lora", "dora"])


def load(checkpoint: str, dtype: str = "float32") -> Any:
    return load_vlm(checkpoint, "sdpa", dtype).eval()


def adapted(checkpoint: str, parts: dict[str, LoraPartConfig], dtype: str = "float32") -> Any:
    """The base with adapters that were moved off their start."""
    vlm = load(checkpoint, dtype)
    add_adapters(vlm, parts, torch.promote_types(vlm.dtype, torch.float32))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapters(vlm).values():
            parameter += 0.05 * torch.randn_like(parameter)
    return vlm


@torch.no_grad()
def logits(vlm: nn.Module) -> Tensor:
    """Of a text; then of the merged features of an image, which the text model does not read here."""
    visual = vlm.get_submodule("base_model.model.model.visual" if isinstance(vlm, PeftModel) else "model.visual")
    values = visual.get_parameter("patch_embed.proj.weight")[0].numel()
    pixels = torch.linspace(-1, 1, 16 * values).view(16, values)
    features = visual(pixels, grid_thw=torch.tensor([[1, 4, 4]]))
    features = getattr(features, "pooler_output", features)
    features, deepstack = features if isinstance(features, tuple) else (features, [])
    parts = [vlm(input_ids=torch.arange(20)[None]).logits, features, *deepstack]
    return torch.cat([part.flatten() for part in parts])


def parts_of(family: str) -> dict[str, LoraPartConfig]:
    """`PARTS` with the family's own name of the last layer in the tower's blocks."""
    targets = ["qkv", FAMILIES[family].lora_targets["vision"][-1]]
    return {**PARTS, "vision": LoraPartConfig(rank=2, alpha=3.0, targets=targets)}


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_new_adapters_change_nothing(tiny_checkpoint: str, parts: dict[str, LoraPartConfig], dtype: str) -> None:
    """Adapters are float32 on a bfloat16 base; peft's own start of DoRA is then off by the rounding of the lengths."""
    base, vlm = load(tiny_checkpoint, dtype), load(tiny_checkpoint, dtype)
    before = {id(parameter): parameter.requires_grad for parameter in vlm.parameters()}
    add_adapters(vlm, parts, torch.promote_types(vlm.dtype, torch.float32))
    expected = torch.float64 if dtype == "float64" else torch.float32
    assert {parameter.dtype for parameter in adapters(vlm).values()} == {expected}
    assert type(vlm) is type(base) and vlm.dtype == base.dtype
    others = [parameter for parameter in vlm.parameters() if id(parameter) in before]
    assert len(others) == len(before) and all(p.requires_grad == before[id(p)] for p in others)
    assert torch.equal(logits(vlm), logits(base))


def test_where_they_sit(tiny_checkpoint: str) -> None:
    """Worked by hand: 2 layers of 7 targets in the language model, 2 blocks of 2 in the tower; A, B and lengths."""
    vlm = adapted(tiny_checkpoint, {**PARTS, "llm": DORA["llm"]})
    names = adapters(vlm)
    assert sum(".language_model." in name for name in names) == 2 * 7 * 3
    assert sum(".visual." in name for name in names) == 2 * 2 * 2
    assert not any("merger" in name or "patch_embed" in name for name in names)
    assert names["model.visual.blocks.1.attn.qkv.lora_A.default.weight"].shape == (2, 32)
    assert names["model.language_model.layers.0.mlp.down_proj.lora_B.default.weight"].shape == (64, 4)
    weight = vlm.get_parameter("model.visual.blocks.1.attn.qkv.base_layer.weight")
    added = names["model.visual.blocks.1.attn.qkv.lora_B.default.weight"]
    added = added @ names["model.visual.blocks.1.attn.qkv.lora_A.default.weight"]
    before = weight.detach().clone()
    merge_adapters(vlm)
    found = vlm.get_parameter("model.visual.blocks.1.attn.qkv.weight")
    torch.testing.assert_close(found, before + 3.0 / 2 * added)


def test_groups(tiny_config: Callable[..., RecipeConfig]) -> None:
    """Adapters are groups of their own, the weights below them stay in the groups of the trunk."""
    config = tiny_config(**ADAPTED)
    model = make_model(config)
    groups = group_parameters(model)
    assert list(groups) == groups_of(config) and {"lora_llm", "lora_vision"} <= groups.keys()
    names = {name: group for group, members in groups.items() for name, _ in members}
    layer = "model.vlm.hf_model.model.language_model.layers.0.self_attn.q_proj"
    assert names[f"{layer}.base_layer.weight"] == names[f"{layer}.base_layer.bias"] == "llm"
    assert names[f"{layer}.lora_magnitude_vector.default.weight"] == "lora_llm"
    assert group_of("vlm.hf_model.model.visual.blocks.0.attn.qkv.lora_B.default.weight") == "lora_vision"
    assert {names[name] for name in names if "lora_" in name} == {"lora_llm", "lora_vision"}
    optimizer = build_optimizer(model, config.optimizer)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"merger": 1e-5, "lora_vision": 1e-4, "lora_llm": 1e-4, "adapter": 1e-4, "detection": 1e-4}
    assert not any(p.requires_grad for _, p in groups["llm"] + groups["vision"])


def test_no_adapters_leave_no_trace(tiny_config: Callable[..., RecipeConfig]) -> None:
    for lora in (None, LoraConfig()):
        config = tiny_config(lora=lora)
        model = make_model(config)
        assert groups_of(config) == list(group_parameters(model)) == ["vision", "merger", "llm", "adapter", "detection"]
        assert not adapters(model)
        assert len({group["name"] for group in build_optimizer(model, config.optimizer).param_groups}) == 5


@pytest.mark.parametrize(("trainer", "expected"), [({}, "float32"), ({"parallelism_config": {"fsdp": {}}}, "bfloat16")])
def test_under_fsdp_adapters_have_the_dtype_of_their_unit(
    tiny_config: Callable[..., RecipeConfig], trainer: dict[str, Any], expected: str
) -> None:
    model = make_model(replace(tiny_config(**ADAPTED, model={"dtype": "bfloat16"}), trainer=trainer)).model
    assert {parameter.dtype for parameter in adapters(model.vlm.hf_model).values()} == {getattr(torch, expected)}
    assert {parameter.dtype for parameter in model.detection_head.parameters()} == {torch.float32}


@BOTH
def test_merged_is_unmerged(tiny_checkpoint: str, parts: dict[str, LoraPartConfig]) -> None:
    vlm, base = adapted(tiny_checkpoint, parts), load(tiny_checkpoint)
    unmerged = logits(vlm)
    merge_adapters(vlm)
    assert vlm.state_dict().keys() == base.state_dict().keys()
    assert not any("peft" in name for module in vlm.modules() for name in vars(module))
    # measured: 2.6e-6, of logits up to 2.5
    assert float((logits(vlm) - unmerged).abs().max()) <= 1e-5
    assert float((logits(base) - unmerged).abs().max()) > 0.1


@BOTH
@pytest.mark.parametrize("with_merger", [False, True])
def test_peft_reads_the_folder(
    tiny_checkpoint: str, parts: dict[str, LoraPartConfig], with_merger: bool, tmp_path: Path
) -> None:
    vlm = adapted(tiny_checkpoint, parts)
    if with_merger:
        with torch.no_grad():
            for name, parameter in vlm.model.visual.named_parameters():
                parameter.mul_(1.5 if "merger" in name else 1.0)
    save_adapters(vlm, parts, tiny_checkpoint, tmp_path, with_merger)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    plain = PeftModel.from_pretrained(load(tiny_checkpoint), str(tmp_path))
    assert float((logits(plain) - logits(vlm)).abs().max()) == 0
    again = adapted(tiny_checkpoint, parts)
    with torch.no_grad():
        for parameter in adapters(again).values():
            parameter.zero_()
    load_adapters(again, tmp_path)
    assert torch.equal(logits(again), logits(vlm))


@OTHER_FAMILIES
def test_other_families(tiny_checkpoint: str, family: str, tmp_path: Path) -> None:
    """Merged is unmerged, and peft reads adapters and mergers that were trained."""
    parts = parts_of(family)
    test_merged_is_unmerged(tiny_checkpoint, parts)
    test_peft_reads_the_folder(tiny_checkpoint, parts, True, tmp_path)
    whole = {part: LoraPartConfig(rank=4) for part in parts}
    names = adapters(adapted(tiny_checkpoint, whole))
    found = {name.split(".")[-4] for name in names if ".visual." in name}
    assert found == set(FAMILIES[family].lora_targets["vision"]) and not any("merger" in name for name in names)


def test_one_part_alone(tiny_checkpoint: str, tmp_path: Path) -> None:
    for part, config in PARTS.items():
        vlm = adapted(tiny_checkpoint, {part: config})
        folder = tmp_path / part
        folder.mkdir()
        save_adapters(vlm, {part: config}, tiny_checkpoint, folder, with_merger=False)
        plain = PeftModel.from_pretrained(load(tiny_checkpoint), str(folder))
        assert float((logits(plain) - logits(vlm)).abs().max()) == 0


def test_missing_and_foreign_adapters_are_named(tiny_checkpoint: str, tmp_path: Path) -> None:
    vlm = adapted(tiny_checkpoint, PARTS)
    save_adapters(vlm, PARTS, tiny_checkpoint, tmp_path, with_merger=False)
    weights = load_file(tmp_path / WEIGHTS_FILE)
    first = next(iter(weights))
    # An older layout of names, which peft itself would take for an adapter that changes nothing.
    renamed = {name.replace("language_model.", ""): value for name, value in weights.items()}
    for content, expected in (
        ({name: value for name, value in weights.items() if name != first}, rf"it lacks {first} \(1 in all\)"),
        ({**weights, "extra": torch.ones(1)}, r"it has beyond the model extra \(1 in all\)"),
        ({**weights, first: torch.ones(3, 3)}, rf"it has of another shape {first} \(1 in all\)"),
        (renamed, r"it lacks base_model.model.model.language_model.* \(28 in all\); it has beyond the model"),
    ):
        save_file(content, tmp_path / WEIGHTS_FILE)
        with pytest.raises(ValueError, match=expected):
            load_adapters(vlm, tmp_path)


def test_one_dora_of_two_has_no_folder() -> None:
    with pytest.raises(ValueError, match=r"lora\.llm\.dora and lora\.vision\.dora differ"):
        peft_config({"llm": PARTS["llm"], "vision": DORA["vision"]}, FAMILIES["qwen2_5_vl"])


@pytest.mark.parametrize(
    ("part", "section", "rates", "expected"),
    [
        ("llm", {}, {}, r"lora\.llm is set, but optimizer\.lr_llm is 1e-05: set optimizer\.lr_llm=0"),
        ("vision", {}, {"lr_llm": 0.0}, r"lora\.vision is set, but optimizer\.lr_vision is 2e-06: set .*lr_vision=0"),
        ("llm", {"targets": ["q_porj"]}, {"lr_llm": 0.0}, r"lora\.llm\.targets holds 'q_porj': did you mean q_proj\?"),
        ("llm", {"targets": ["qkv"]}, {"lr_llm": 0.0}, r"holds 'qkv': one of: down_proj, gate_proj, k_proj, o_proj"),
        ("llm", {"targets": ["lm_head"]}, {"lr_llm": 0.0}, r"holds lm_head: losses .* counts twice; leave it out"),
        ("llm", {"targets": ["q_proj", "embed_tokens"]}, {"lr_llm": 0.0}, r"holds embed_tokens: .* counts twice"),
        ("llm", {"targets": []}, {"lr_llm": 0.0}, r"lora\.llm\.targets is empty: give some of q_proj, .* or null"),
    ],
)
def test_mistakes_are_named(part: str, section: dict[str, Any], rates: dict[str, Any], expected: str) -> None:
    lora = LoraConfig(**{part: LoraPartConfig(**section)})
    with pytest.raises(ConfigError, match=expected):
        check_adapters(RecipeConfig(lora=lora, optimizer=OptimizerConfig(**rates)))


def test_without_peft_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipe.models.lora.find_spec", lambda name: None)
    check_adapters(RecipeConfig(lora=LoraConfig()))
    config = RecipeConfig(lora=LoraConfig(llm=LoraPartConfig()), optimizer=OptimizerConfig(lr_llm=0.0))
    with pytest.raises(ConfigError, match=r"lora needs peft, .* pip install -e '\.\[lora\]', or set lora=null"):
        check_adapters(config)
