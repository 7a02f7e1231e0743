"""The estimate of a run's memory: what is static exactly, a block's activations nearly."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipe.config import EmaConfig, LoraConfig, LoraPartConfig, RecipeConfig
from recipe.configure import load_config
from recipe.estimate import (
    CAPTION_TOKENS,
    GIB,
    adapter_bytes,
    block_bytes,
    build_on_meta,
    estimate,
    largest_packs,
    main,
    microbatch_shape,
    savings,
    table,
)
from recipe.families import FAMILIES, PUBLISHED, vision_sizes
from recipe.models.layers import DeformableAttention
from recipe.models.network import AVERAGE
from recipe.models.proposals import ProposalHead
from recipe.models.pyramid import FeaturePyramid
from recipe.models.token_losses import CHUNK
from recipe.optim.fsdp import BACKBONE_UNITS
from recipe.optim.groups import build_optimizer, group_parameters
from recipe.rules import check_config
from recipe.schema import Example
from recipe.schema import Memory as ImageMemory
from recipe.train import run
from tests.support.tiny_cases import (
    ADAPTED,
    ALL_SWITCHES,
    EVERY_FAMILY,
    losses_and_gradients,
    make_batches,
    make_model,
)

YAML = str(Path(__file__).resolve().parents[2] / "yamls" / "joint.yaml")
SIZES = {
    "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen/Qwen2-VL-7B-Instruct": 8_291_375_616,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
}


def config_of(name: str, *overrides: str) -> RecipeConfig:
    return load_config(YAML, [f"model.pretrained_model_name_or_path={name}", *overrides])


@pytest.mark.parametrize(("name", "expected"), SIZES.items())
def test_published_sizes(name: str, expected: int) -> None:
    config = config_of(name)
    network = build_on_meta(config)
    groups = group_parameters(network)
    counts = {group: sum(parameter.numel() for _, parameter in members) for group, members in groups.items()}
    assert counts["vision"] + counts["merger"] + counts["llm"] == expected
    assert all(parameter.is_meta for members in groups.values() for _, parameter in members)
    assert ("deepstack" in str([name for name, _ in groups["merger"]])) == ("Qwen3" in name)
    units = [part for part in network.modules() if type(part).__name__ in BACKBONE_UNITS]
    hf_config: Any = network.vlm.hf_model.config
    assert len(units) == hf_config.vision_config.depth + hf_config.get_text_config().num_hidden_layers
    assert estimate(config, network, 8).needed > 2 * expected
    assert SIZES.keys() == PUBLISHED.keys()


def num_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        ALL_SWITCHES,
        ADAPTED,
        {**ADAPTED, "model": {"dtype": "bfloat16", "frozen_dtype": "nf4"}},
        {"optimizer": {"lr_vision": 0.0, "moments": "8bit"}},
    ],
    ids=["plain", "all_switches", "adapted", "nf4", "8bit"],
)
def test_static_part_is_that_of_real_tensors(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example], switches: dict[str, Any]
) -> None:
    """Vision frozen, a language model in bfloat16 under head and adapters in float32, and averages of the head."""
    settings = {"model": {"dtype": "bfloat16"}, "optimizer": {"lr_vision": 0.0}, "ema": EmaConfig()}
    config = tiny_config(**{**settings, **switches})
    model = make_model(config)
    losses_and_gradients(model, make_batches([tiny_examples["one"]], "packed", 1))
    optimizer = build_optimizer(model, config.optimizer)
    model.zero_grad()
    model.loss(model(batch := make_batches([tiny_examples["one"]], "packed", 1)[0]), batch)["total"].backward()
    optimizer.step()
    found = estimate(config, build_on_meta(config), 1)
    assert found.weights == num_bytes([parameter.data for parameter in model.parameters()])
    assert found.gradients == num_bytes([p.grad for p in model.parameters() if p.grad is not None])
    names = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
    moments = [state[name] for state in optimizer.state.values() for name in names if name in state]
    assert found.moments == num_bytes(moments)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    kept = [p.data for name, p in model.named_parameters() if id(p) in held or AVERAGE in name]
    assert found.snapshot == num_bytes(kept) + found.moments


def test_ranks_share_what_is_sharded(tiny_config: Callable[..., RecipeConfig]) -> None:
    config = tiny_config(model={"dtype": "float32"})
    network = build_on_meta(config)
    one, ddp = estimate(config, network, 1), estimate(config, network, 4)
    sharded_config = replace(config, trainer={"parallelism_config": {"fsdp": {}}})
    fsdp = estimate(sharded_config, network, 4)
    assert ddp.weights == one.weights and ddp.gradients == 2 * one.gradients
    for part in ("weights", "gradients", "moments", "snapshot"):
        assert getattr(fsdp, part) == getattr(one, part) // 4
    assert 0 < fsdp.compute_copies < one.weights and one.compute_copies == 0
    assert one.device_total == sum(vars(one).values()) - one.snapshot - one.host


def saved_bytes(block: nn.Module, run: Callable[[], Any]) -> int:
    """What autograd keeps of a block beside its own weights, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)


def test_adapters_of_3b(capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 16 on all projections, worked by hand; without adapters their groups are not in the table."""
    overrides = ("lora.llm={}", "optimizer.lr_llm=0", "optimizer.lr_vision=0", "trainer.parallelism_config=null")
    config = config_of("Qwen/Qwen2.5-VL-3B-Instruct", *overrides)
    groups = group_parameters(build_on_meta(config))
    # Query and output, key and value, gate and up, down: the sums of both sides.
    sides = 2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 11008)
    assert sum(parameter.numel() for _, parameter in groups["lora_llm"]) == 36 * 16 * sides
    main([YAML, *overrides])
    printed = capsys.readouterr().out
    assert "lora_llm              29.9 M parameters\n" in printed and "lora_vision" not in printed
    assert "llm                 3085.9 M parameters, frozen" in printed
    main([YAML, "trainer.parallelism_config=null"])
    assert "lora" not in capsys.readouterr().out


@EVERY_FAMILY
@pytest.mark.parametrize("with_adapters", [False, True])
@pytest.mark.parametrize("kind", ["vision", "llm"])
def test_activations_of_a_block(
    tiny_config: Callable[..., RecipeConfig],
    tiny_examples: dict[str, Example],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    kind: str,
    with_adapters: bool,
) -> None:
    part = LoraPartConfig(rank=4)
    changes = {"lora": LoraConfig(part, part), "optimizer": {"lr_llm": 0.0, "lr_vision": 0.0}} if with_adapters else {}
    model = make_model(tiny_config(model={"dtype": "float32", "frozen_dtype": "same"}, **changes))
    hf_model = model.model.vlm.hf_model
    block = hf_model.model.visual.blocks[0] if kind == "vision" else hf_model.model.language_model.layers[0]
    measured: list[int] = []

    def watched(*args: Any, _forward: Any = block.forward, **kwargs: Any) -> Any:
        outputs: list[Any] = []
        measured.append(saved_bytes(block, lambda: outputs.append(_forward(*args, **kwargs))))
        return outputs[0]

    monkeypatch.setattr(block, "forward", watched)
    (batch,) = make_batches([tiny_examples["one"], tiny_examples["text"]], "packed", 2)
    model(batch)
    rows = len(batch["pixel_patches"]) if kind == "vision" else batch["input_ids"].numel()
    width, inner = vision_sizes(hf_model.config)
    if kind == "llm":
        width, inner = model.model.vlm.text_config.hidden_size, model.model.vlm.text_config.intermediate_size
    kept, has_head_norms = FAMILIES[family].feed_forward_rows, kind == "llm" and family == "qwen3_vl"
    expected = block_bytes(rows, width, width, inner, 4, 4 if kind == "llm" else kept, has_head_norms)
    # measured: 0.92 for vision, where queries, keys and values are also kept in one piece; 0.997 for language; with
    # adapters 0.995 and 1.09, as a frozen layer keeps no input
    # Qwen2-VL: 0.991, with adapters 1.04; Qwen3-VL: 1.03, with adapters 1.18, as frozen norms of heads keep nothing
    rel = 0.2 if has_head_norms and with_adapters else 0.1
    assert expected + rows * adapter_bytes(block, 4, amp=False) == pytest.approx(measured[0], rel=rel)


def test_checkpointing_and_sharding_need_less() -> None:
    name = "Qwen/Qwen2.5-VL-3B-Instruct"
    config = config_of(name)
    network = build_on_meta(config)
    plain = estimate(config_of(name, "model.gradient_checkpointing=false"), network, 8)
    checkpointed = estimate(config, network, 8)
    assert checkpointed.activations < plain.activations / 5
    half = estimate(config_of(name, "train_loader.packing.max_tokens=2048"), network, 8)
    assert half.activations == pytest.approx(checkpointed.activations / 2, rel=1e-6)
    assert half.logits == checkpointed.logits == CHUNK * 151936 * (2 + 8)  # of one chunk, however long the packs
    assert microbatch_shape(config, 2) == (4096, 4 * 4096)
    assert microbatch_shape(config_of(name, "train_loader.packing.max_patches=5000"), 2) == (4096, 5000)


def test_the_heads_switches_need_more() -> None:
    """3B, 4,096 tokens: 16 images of 4 x 256 patches; a head of 2 layers and 4 of captions, 256 wide, in float32."""
    plain = {
        "num_queries": 100,
        "width": 256,
        "num_layers": 2,
        "ffn_factor": 4,
        "multi_scale": "false",
        "select_queries": "false",
        "num_query_groups": 1,
    }

    def need(**switches: object) -> tuple[int, int]:
        overrides = [f"detection_head.{key}={value}" for key, value in {**plain, **switches}.items()]
        config = config_of("Qwen/Qwen2.5-VL-3B-Instruct", "trainer.precision=fp32", *overrides)
        found = estimate(config, build_on_meta(config), 1)
        return found.activations, found.logits

    activations, logits = need()
    queries, row = 16 * 100, 256 * 4
    assert need(num_query_groups=3) == (activations + 2 * 2 * queries * 28 * 256 * 4, logits)
    maps = 4096 * (200 + 2 * 22) * row + 4096 * (3 * 32 * 32 + 8 * 1280 + 2 * 2048) * 4
    denoised = 16 * 2 * 4 * 16
    more = maps + 2 * 22 * (queries + denoised) * row
    assert need(multi_scale="true") == (activations + more, logits)
    assert need(multi_scale="true", select_queries="true") == (activations + more + 4096 * 43 * row, logits)


def test_activations_of_maps() -> None:
    """Of two images of 6 x 8 tokens, in float32: pyramid, one layer's look by 20 queries each, and proposals."""
    width, tower, hidden, tokens = 64, 48, 96, 2 * 6 * 8
    pyramid, look, finder = (
        FeaturePyramid(hidden, tower, width),
        DeformableAttention(width, 4, 4, 4),
        ProposalHead(width),
    )
    images, features = torch.randn(2, 3, 28 * 6, 28 * 8), torch.randn(2, tokens // 2, hidden)
    before = torch.randn(2, tokens // 2, 4, tower)
    made: list[Any] = []
    kept = saved_bytes(pyramid, lambda: made.extend(pyramid([*images], [*features], [*before], [(6, 8)] * 2)))
    levels, extents = made
    levels = [level.detach().requires_grad_() for level in levels]
    finest, maps = levels[0].nbytes, sum(level.nbytes for level in levels)
    row, own = 4 * width, 4 * tokens * (3 * 32 * 32 + 8 * tower + 2 * hidden)
    assert 200 * tokens * row + own == pytest.approx(kept + maps, rel=0.1)
    states, boxes = torch.randn(2, 20, width, requires_grad=True), torch.rand(2, 20, 4)
    kept = saved_bytes(look, lambda: look(states, boxes, levels, extents)) - maps
    assert 22 * (tokens + 2 * 20) * row == pytest.approx(kept, rel=0.1)
    none = torch.zeros(2, 1, width)
    memory = ImageMemory(none, none, torch.ones(2, 1).bool(), none[..., :4], levels, extents, [(24, 32)] * 2)
    assert 43 * tokens * row == pytest.approx(saved_bytes(finder, lambda: finder(memory)) - finest, rel=0.1)


HEAD = str(Path(YAML).with_name("head.yaml"))


def test_what_is_frozen_is_stored_in_bfloat16() -> None:
    """By hand: 3,754,622,976 weights of the trunk in two bytes, all else in four; no graph of the trunk is kept."""
    config = load_config(HEAD)
    network = build_on_meta(config)
    head = sum(parameter.numel() for name, parameter in network.named_parameters() if not name.startswith("vlm."))
    found = estimate(config, network, 1)
    trained = head - sum(average.numel() for _, average in network.averaged_parameters())
    assert found.weights == 2 * 3_754_622_976 + 4 * head
    assert (found.gradients, found.moments, found.snapshot) == (4 * trained, 8 * trained, 4 * head + 8 * trained)
    assert estimate(load_config(HEAD, ["nan_rollback.snapshot=off"]), network, 1).snapshot == 0
    assert found.host > found.snapshot + found.weights
    on_cpu = estimate(load_config(HEAD, ["trainer.device=cpu"]), network, 1)
    assert on_cpu.host - found.host == on_cpu.device_total - on_cpu.weights


LORA = str(Path(YAML).with_name("lora.yaml"))
NF4_OF_7B = ["model.pretrained_model_name_or_path=Qwen/Qwen2.5-VL-7B-Instruct", "model.frozen_dtype=nf4"]


def test_7b_in_nf4(capsys: pytest.CaptureFixture[str]) -> None:
    """Each weight of 28 blocks in 4.127 bits, by hand: 4 + 8 / 64 + 32 / (64 * 256); all else as in bfloat16."""
    rounded, in_nf4 = (load_config(LORA, NF4_OF_7B[:count]) for count in (1, 2))
    networks = [build_on_meta(config) for config in (rounded, in_nf4)]
    before, after = (estimate(config, made, 1) for config, made in zip((rounded, in_nf4), networks, strict=True))
    # Query and output, key and value, gate, up and down of a block.
    weights = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    small = 28 * 7 * (4 + 24)  # a layer's mean of scales, and what it was made from
    assert before.weights - after.weights == pytest.approx(weights * (2 - (4 + 8 / 64 + 32 / 64 / 256) / 8) - small)
    assert after.compute_copies - before.compute_copies == 2 * 3584 * 18944  # one weight is whole
    assert after.activations == before.activations and after.snapshot == before.snapshot
    assert after.host == pytest.approx(before.host, abs=small)  # it is loaded in bfloat16
    assert after.needed <= 22 * GIB and in_nf4.train_loader.packing and in_nf4.train_loader.packing.max_tokens == 4096
    header = Path(LORA).read_text().split("\nseed:")[0]
    assert f"model.frozen_dtype=nf4 ({after.needed / GIB:.1f} GiB" in header
    main([LORA, *NF4_OF_7B])
    assert "llm                 7615.6 M parameters, frozen" in capsys.readouterr().out


def test_the_largest_pack_that_fits() -> None:
    """The next larger one does not."""
    config = load_config(HEAD)
    network = build_on_meta(config)
    tokens = largest_packs(config, network, 1, 24)
    assert tokens is not None and tokens % 256 == 0

    def needed(tokens: int) -> int:
        return estimate(load_config(HEAD, [f"train_loader.packing.max_tokens={tokens}"]), network, 1).needed

    assert needed(tokens) <= 24 * GIB < needed(tokens + 256)
    assert largest_packs(config, network, 1, 8) is None


@pytest.mark.parametrize(
    ("card", "overrides", "words"),
    [
        (8, [], "no pack fits 8 GiB: freeze parts or set lora"),
        (11, [], "11 GiB are enough for train_loader.packing.max_tokens="),
        (24, [], "fit 24 GiB: look for another process on the GPU"),
        (24, ["train_loader.packing=null"], "set train_loader.packing={max_tokens: 2048}"),
    ],
)
def test_a_full_gpu_is_told_what_to_set(
    card: int, overrides: list[str], words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the size of the card it ran on; the error itself is raised on."""

    def fill_the_card(config: RecipeConfig) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("recipe.train.main", fill_the_card)
    monkeypatch.setattr("recipe.checkpoints.sigterm.exit_on_sigterm", lambda: None)
    monkeypatch.setattr("recipe.checks.check_machine", lambda config: None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=card * GIB))
    with pytest.raises(torch.OutOfMemoryError):
        run(load_config(HEAD, overrides))
    assert "the GPU is out of memory" in caplog.text and words in caplog.text


@pytest.mark.parametrize("name", ["head", "lora", "joint", "joint_fsdp"])
def test_what_would_save_memory_is_accepted(name: str) -> None:
    """By the checks that training makes; each is less than the run needs."""
    path = str(Path(YAML).with_name(f"{name}.yaml"))
    found = savings(lambda more: load_config(path, more), 8)
    assert found
    for way, saved in found:
        check_config(load_config(path, way.split()))
        assert saved > 0


def test_answer(capsys: pytest.CaptureFixture[str]) -> None:
    main([HEAD, "model.gradient_checkpointing=false"])
    last = capsys.readouterr().out.splitlines()[-4:]
    assert last[0].startswith("fits a GPU of  24 GB: yes, 40 GB: yes, 80 GB: yes  (needs 1")
    ways = ("model.frozen_dtype=nf4", "train_loader.packing.max_tokens=2048", "optimizer.moments=8bit")
    assert all(line.endswith(f"GiB  {way}") for line, way in zip(last[1:], ways, strict=True))
    main([HEAD, "--fit", "24"])
    assert "train_loader.packing.max_tokens=" in capsys.readouterr().out
    main([HEAD, "--json"])
    sizes = json.loads(capsys.readouterr().out)
    parts = ("weights", "gradients", "moments", "compute_copies", "activations", "logits")
    assert sizes["sum"] == pytest.approx(sum(sizes[name] for name in parts), abs=0.01)
    with pytest.raises(SystemExit):
        main([HEAD, "--fit", "4"])
    assert "no pack fits 4 GiB" in capsys.readouterr().err


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    main([YAML, "--world-size", "8", "optimizer.lr_vision=0", "trainer.parallelism_config=null"])
    printed = capsys.readouterr().out
    for word in ("8 x DDP", "vision", "frozen", "moments", "snapshot", "total", f"{CAPTION_TOKENS} tokens per caption"):
        assert word in printed
    sharded = config_of("Qwen/Qwen2.5-VL-7B-Instruct", "trainer.parallelism_config.fsdp={}")
    assert "64 x FSDP" in table(sharded, build_on_meta(sharded), 64)


def test_command_names_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([YAML, "no_such=1"], [YAML, "model.pretrained_model_name_or_path=no/such/folder"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "configuration error" in capsys.readouterr().err
