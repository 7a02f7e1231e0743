"""What FSDP makes of the model: its units, their precision, what is rounded and what not; and what a yaml may say."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Precision
from composer.devices import DeviceCPU
from composer.distributed import dist_strategy
from composer.distributed.dist_strategy import prepare_fsdp_module
from composer.distributed.fsdp2 import prepare_fully_shard
from composer.distributed.fsdp2_utils import generate_composer_model_policy
from composer.distributed.param_init import meta_init
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from safetensors.torch import save_file
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import Qwen2_5_VLForConditionalGeneration

from recipe.algorithms.staged_freezing import plain_name
from recipe.checks import check_libraries
from recipe.config import ConfigError, RecipeConfig
from recipe.configure import load_config
from recipe.data.collate import collate_packed, one_each
from recipe.estimate import model_config
from recipe.joint import JointModel
from recipe.load import build_network, load_base
from recipe.losses import counts
from recipe.losses.counts import split_batch
from recipe.models.vlm import mapped_dtype
from recipe.optim import fsdp as parallel
from recipe.optim.fsdp import build_parallelism, fill_unit_by_unit
from recipe.optim.groups import group_parameters
from recipe.optim.schedule import build_schedule
from recipe.rules import check_config, check_fields, check_trainer
from recipe.schema import Example, ImageSpec
from recipe.upstream.trainer_section import view_trainer
from tests.distributed import fsdp_shim
from tests.distributed.one_step import whole, whole_parameters
from tests.support.tiny_cases import make_batches, make_model

YAMLS = Path(__file__).resolve().parents[2] / "yamls"
TRAINER = {"precision": "amp_bf16", "parallelism_config": {"fsdp": {}}}
HEAD = ("memory", "detection_head", "caption_decoder")


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    for owner, name in (
        (torch.cuda, "current_device"),
        (nn.Module, "to_empty"),
        (FSDP2Config, "settable_attrs"),
        (parallel, "check_device"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back at the end
    monkeypatch.setattr(dist_strategy, "_validate_precision", lambda precision, device: None)  # no bf16 on the CPU
    fsdp_shim.install()
    init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    destroy_process_group()


def shard(model: JointModel, version: int) -> None:
    """As Composer's Trainer does in bf16, which it refuses on the CPU."""
    built = build_parallelism(model.model, {}, "amp_bf16", version)
    assert built is not None
    config = built["fsdp"]
    config.device_mesh = init_device_mesh("cpu", (1,))
    if isinstance(config, FSDP2Config):
        policy = generate_composer_model_policy(model)
        prepare_fully_shard(model, config, Precision.AMP_BF16, policy)
    else:
        assert isinstance(config, FSDPConfig)
        prepare_fsdp_module(model, None, config, Precision.AMP_BF16, DeviceCPU(), False)


def precision_of(module: FSDPModule | FullyShardedDataParallel) -> Any:
    """(weights, gradient sums) of a unit; None: as they are stored."""
    if isinstance(module, FSDPModule):
        policy = module._get_fsdp_state()._mp_policy
        return policy.param_dtype, policy.reduce_dtype
    assert module.mixed_precision.buffer_dtype is None
    return module.mixed_precision.param_dtype, module.mixed_precision.reduce_dtype


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("version", [1, 2])
def test_backbone_in_bf16_head_and_boxes_in_float32(
    tiny_config: Callable[..., RecipeConfig], tiny_examples: dict[str, Example], version: int
) -> None:
    model = make_model(tiny_config(model={"dtype": "float32"}))
    shard(model, version)
    units = {
        name.replace("_fsdp_wrapped_module.", ""): precision_of(module)
        for name, module in model.named_modules()
        if isinstance(module, FSDPModule | FullyShardedDataParallel)
    }
    in_full = {name for name in units if name.split(".")[1:2] and name.split(".")[1] in HEAD}
    # 2 vision blocks, 2 language layers and the root; memory, head and decoder with 2 layers each.
    assert (len(units) - len(in_full), len(in_full)) == (5, 7)
    for name, precision in units.items():
        assert precision == ((None, None) if name in in_full else (torch.bfloat16, torch.float32)), name
    (batch,) = make_batches([tiny_examples["two"], tiny_examples["one"]], "packed", 2)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch)
        total = model.loss(outputs, batch)["total"]
    total.backward()
    for seen, given in zip(outputs.targets, batch["targets"], strict=True):
        assert seen is not None and given is not None and torch.equal(seen["boxes"], given["boxes"])
    assert outputs.detection.pred_boxes.dtype == torch.float32
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.dtype == torch.float32 for gradient in gradients)
    # The images' mean and the rotary frequencies would lose their last digits.
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers() if buffer.is_floating_point())


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("version", [1, 2])
def test_units_are_filled_with_the_weights_of_the_file(
    tiny_config: Callable[..., RecipeConfig], tmp_path: Path, version: int
) -> None:
    """They are mapped in bfloat16 until then, which no rank holds in float32 as a whole."""
    config = replace(tiny_config(model={"dtype": "bfloat16"}), trainer={**TRAINER, "max_duration": "1ep"})
    load_base(config).save_pretrained(tmp_path / "base")
    config = replace(config, model=replace(config.model, dtype="float32"), fsdp_version=version)
    vlm = load_base(config, str(tmp_path / "base"), as_stored=True)
    assert {weight.dtype for weight in vlm.parameters()} == {torch.bfloat16}
    network = build_network(config, vlm, ImageSpec(14, 2, 3136, 12845056, (0.5,) * 3, (0.5,) * 3), 8)
    expected = {name: weight.detach().float() for name, weight in network.named_parameters(remove_duplicate=False)}
    tokenizer: Any = None
    model = JointModel(network, tokenizer, config.loss, config.evaluation, config.prompt)
    fill_unit_by_unit(network, network.vlm, torch.float32)
    assert all(weight.is_meta for weight in network.vlm.parameters())
    shard(model, version)
    if version == 2:
        meta_init(model)  # as Composer does
    with whole_parameters(model):
        found = {
            plain_name(name).removeprefix("model."): whole(weight.detach())
            for name, weight in model.named_parameters(remove_duplicate=False)
        }
        assert {name: weight.dtype for name, weight in found.items()} == dict.fromkeys(expected, torch.float32)
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert network.vlm.hf_model.lm_head.weight is network.vlm.embed_tokens.weight


@pytest.mark.parametrize(
    ("stored", "trained", "read"),
    [
        (["bfloat16"], "float32", "bfloat16"),
        (["float32"], "float64", "float32"),
        (["float32"], "bfloat16", "bfloat16"),
        (["bfloat16", "float32"], "float32", "float32"),
        (["float16"], "float32", "float32"),
        ([], "float32", "float32"),
    ],
)
def test_a_file_is_mapped_where_no_value_is_rounded(stored: list[str], trained: str, read: str, tmp_path: Path) -> None:
    for sharded in (False, True):
        folder = tmp_path / str(sharded)
        folder.mkdir()
        weights = {f"weight.{index}": torch.zeros(2, dtype=getattr(torch, name)) for index, name in enumerate(stored)}
        if weights and not sharded:
            save_file(weights, folder / "model.safetensors")
        elif weights:
            for name, weight in weights.items():
                save_file({name: weight}, folder / f"{name}.safetensors")
            index = {"weight_map": {name: f"{name}.safetensors" for name in weights}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert mapped_dtype(str(folder), trained) == read


@pytest.mark.parametrize(
    ("name", "layers", "blocks"),
    [("joint.yaml", 36, 32), ("joint_fsdp.yaml", 28, 32)],
)
def test_the_real_models_have_groups_stages_and_units(
    name: str, layers: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3B and 7B on the meta device, as their yamls say."""
    monkeypatch.setattr(parallel, "check_device", lambda: None)
    config = load_config(str(YAMLS / name))
    check_config(config)
    assert build_schedule(config.scheduler, config.staged_freezing, config.optimizer).stages.keys() == {
        "llm",
        "adapter",
        "detection",
    }
    spec = ImageSpec(14, 2, 3136, 12845056, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    with torch.device("meta"):
        vlm = Qwen2_5_VLForConditionalGeneration(model_config(config.model.pretrained_model_name_or_path))
        vlm.tie_weights()
        network = build_network(config, vlm, spec)
    tokenizer: Any = None
    model = JointModel(network, tokenizer, config.loss, config.evaluation, config.prompt)
    assert all(group_parameters(model).values())
    view = view_trainer(config)
    built = build_parallelism(network, view.fsdp, view.precision, config.fsdp_version)
    assert built is not None and isinstance(built["fsdp"], FSDP2Config)
    policy = generate_composer_model_policy(model)
    units = policy._run_policy(model, set(), {"mp_policy": "backbone"})
    counts = Counter(type(module).__name__ for module in units)
    assert config.detection_head is not None
    head, decoder = config.detection_head.num_layers, config.caption_decoder.num_layers
    assert counts == {
        "JointNetwork": 1,
        "Qwen2_5_VLVisionBlock": blocks,
        "Qwen2_5_VLDecoderLayer": layers,
        "MemoryBuilder": 1,
        "DetectionHead": 1,
        "DecoderLayer": head,
        "CaptionDecoder": 1,
        "CaptionLayer": decoder,
    }
    in_full = [module for module, keywords in units.items() if keywords["mp_policy"] != "backbone"]
    assert len(in_full) == 3 + head + decoder


@pytest.mark.parametrize(
    ("section", "version", "expected"),
    [
        ({"fsdp2": {}}, 2, "fsdp2 is ignored by Composer, which would run plain DDP: write fsdp, and fsdp_version: 2"),
        ({"tp": {}}, 2, "a key of trainer.parallelism_config is 'tp': it must be fsdp"),
        ({"fsdp": True}, 2, "fsdp is True: give keywords, {} for none, or null for DDP"),
        ({"fsdp": {"mixed_precison": "PURE"}}, 2, "unknown key .*mixed_precison .*: did you mean mixed_precision"),
        ({"fsdp": {"sharding_strategy": "FULL_SHARD"}}, 2, "unknown key .*sharding_strategy with fsdp_version 2"),
        ({"fsdp": {"sharding_strategy": "NO_SHARD"}}, 1, "is 'NO_SHARD': it must be one of FULL_SHARD, SHARD_GRAD_OP"),
        ({"fsdp": {"mixed_precision": "bf16"}}, 2, "is 'bf16': it must be one of DEFAULT, PURE, FULL"),
        ({"fsdp": {"state_dict_type": "local"}}, 1, "is 'local': it must be one of full, sharded"),
        ({"fsdp": {"activation_checkpointing": True}}, 2, "cannot be set: set model.gradient_checkpointing"),
        ({"fsdp": {"use_orig_params": False}}, 1, "cannot be set: .* parameter groups need it"),
        ({"fsdp": {"device_mesh": 2}}, 2, "cannot be set: set data_parallel_shard_degree and data_parallel_replicate"),
        ({"fsdp": {"sharded_ckpt_prefix_dir": "ba{batch}"}}, 1, "ignored without state_dict_type: sharded"),
        ({"fsdp": {"state_dict_type": "sharded", "load_monolith_rank0_only": True}}, 2, "is for state_dict_type: full"),
        ({}, 3, "fsdp_version is 3: it must be one of 1, 2"),
    ],
)
def test_what_would_be_ignored_is_refused(section: dict[str, Any], version: int, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_parallelism({"precision": "amp_bf16", "parallelism_config": section}, version)


def check_parallelism(trainer: dict[str, Any], version: int) -> None:
    config = RecipeConfig(fsdp_version=version, trainer={"max_duration": "1ep", **trainer})
    config.train_loader.streams = config.eval_loader.streams = {}
    config.run_folder = config.model.pretrained_model_name_or_path = ""
    config.train_loader.global_batch_size = config.eval_loader.global_batch_size = 1
    check_fields(config)
    check_trainer(config.trainer)
    check_libraries(config)


def test_what_is_right_passes() -> None:
    check_parallelism({"parallelism_config": None}, 2)
    check_parallelism({"parallelism_config": {"fsdp": None}}, 2)
    check_parallelism({**TRAINER, "parallelism_config": {"fsdp": {"sharding_strategy": "SHARD_GRAD_OP"}}}, 1)
    check_parallelism({**TRAINER, "parallelism_config": {"fsdp": {"reshard_after_forward": False}}}, 2)
    with pytest.raises(ConfigError, match=r"missing trainer\.precision"):
        check_parallelism({"parallelism_config": {"fsdp": {}}}, 2)


@pytest.mark.parametrize(("others", "agree"), [((2, 2), True), ((1, 3), False), ((3, 4), False)])
def test_ranks_with_other_numbers_of_microbatches_are_told(
    monkeypatch: pytest.MonkeyPatch, tiny_examples: dict[str, Example], others: tuple[int, ...], agree: bool
) -> None:
    """This rank has 2; where the others have 1 and 3, it must not go on alone though the mean is its own number."""

    def add_others(sums: torch.Tensor) -> None:
        sums[-2] += sum(others)
        sums[-1] += sum(number**2 for number in others)

    monkeypatch.setattr(counts.dist, "all_reduce", add_others)
    monkeypatch.setattr(counts.dist, "get_world_size", lambda: 3)
    batches = [collate_packed(one_each([tiny_examples["one"]])) for _ in range(2)]
    if agree:
        split = split_batch(batches, 1, equally_many=True)
        assert [batch["loss_counts"]["microbatches"] for batch in split] == [6, 6]
    else:
        with pytest.raises(ValueError, match=r"this rank has 2 microbatches .* FSDP needs the same number"):
            split_batch(batches, 1, equally_many=True)
        split_batch(batches, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fsdp_without_a_gpu_is_refused() -> None:
    network: Any = None
    with pytest.raises(ConfigError, match=r"fsdp needs a GPU, but none is found: set trainer\.parallelism_config=null"):
        build_parallelism(network, {}, "amp_bf16", 2)
