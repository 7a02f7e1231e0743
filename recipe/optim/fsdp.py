"""FSDP through Composer's own configuration: what becomes a unit, in which precision, and what a yaml may say."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from torch import nn
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, Qwen2_5_VLVisionBlock

from recipe.config import ConfigError, nearest
from recipe.joint import JointModel
from recipe.models.caption_decoder import CaptionDecoder, CaptionLayer, Vocabulary
from recipe.models.detection_head import DecoderLayer, DetectionHead
from recipe.models.memory import MemoryBuilder

# The root holds the rest: token embedding, output matrix, patch embedding, merger, norms.
BACKBONE_UNITS: tuple[type[nn.Module], ...] = (Qwen2_5_VLVisionBlock, Qwen2_5_VLDecoderLayer)
HEAD_UNITS: tuple[type[nn.Module], ...] = (
    MemoryBuilder,
    DetectionHead,
    DecoderLayer,
    CaptionDecoder,
    CaptionLayer,
    Vocabulary,
)

_CHECKPOINTING = "set model.gradient_checkpointing, which also works without FSDP"
_ONE_MESH = "leave it out: the parameters are sharded over all ranks, and norms are summed over them"
_NO_ENGINE = "leave it out: no Transformer Engine layers are used"
_REFUSED: Mapping[str, str] = {
    "activation_checkpointing": _CHECKPOINTING,
    "activation_checkpointing_reentrant": _CHECKPOINTING,
    "activation_cpu_offload": "it renames the parameters; " + _CHECKPOINTING,
    "auto_wrap": "leave it out: the units are those of recipe/optim/fsdp.py",
    "cpu_offload": "leave it out: Composer does not support it yet",
    "data_parallel_replicate_degree": _ONE_MESH,
    "data_parallel_shard_degree": _ONE_MESH,
    "device_mesh": _ONE_MESH,
    "ignored_modules": "leave it out: nothing is left unsharded",
    "load_planner": "leave it out: it is no value of a yaml",
    "process_group": _ONE_MESH,
    "save_planner": "leave it out: it is no value of a yaml",
    "te_checkpoint_wrapper": _NO_ENGINE,
    "te_shard_fp8_weight": _NO_ENGINE,
    "use_orig_params": "leave it out: parameter groups need it to be true",
}
_CONFIGS: Mapping[int, type[FSDPConfig] | type[FSDP2Config]] = {1: FSDPConfig, 2: FSDP2Config}
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "backward_prefetch": ("BACKWARD_PRE", "BACKWARD_POST", "NONE"),
    "mixed_precision": ("DEFAULT", "PURE", "FULL"),
    "reshard_after_forward": (True, False),
    "sharding_strategy": ("FULL_SHARD", "SHARD_GRAD_OP"),
    "state_dict_type": ("full", "sharded"),
}


def check_parallelism(trainer: Mapping[str, Any], version: int) -> None:
    """Checks `trainer.parallelism_config`, of which Composer ignores what it does not know.

    Args:
        trainer: The section of the yaml.
        version: `fsdp_version`.

    Raises:
        ConfigError: Naming the key and the remedy.
    """
    where = "trainer.parallelism_config"
    if version not in _CONFIGS:
        raise ConfigError(f"fsdp_version is {version}: it must be 1 or 2")
    sections = trainer.get("parallelism_config") or {}
    if not isinstance(sections, Mapping):
        raise ConfigError(f"{where} is {sections!r}: give fsdp with its keywords, or null for DDP")
    for key in sections:
        if key == "fsdp2":
            raise ConfigError(
                f"{where}.fsdp2 is ignored by Composer, which would run plain DDP: write fsdp, "
                "and fsdp_version: 2 at the top of the yaml"
            )
        if key != "fsdp":
            raise ConfigError(f"a key of {where} is {key!r}: it must be fsdp")
    keywords = sections.get("fsdp")
    if keywords is None:
        return
    if not isinstance(keywords, Mapping):
        raise ConfigError(f"{where}.fsdp is {keywords!r}: give keywords, {{}} for none, or null for DDP")
    names = [entry.name for entry in fields(_CONFIGS[version]) if not entry.name.startswith("_")]
    allowed = [name for name in names if name not in _REFUSED]
    for key, value in keywords.items():
        if key in _REFUSED:
            raise ConfigError(f"{where}.fsdp.{key} cannot be set: {_REFUSED[key]}")
        if key not in allowed:
            raise ConfigError(f"unknown key {where}.fsdp.{key} with fsdp_version {version}: {nearest(key, allowed)}")
        if value not in _CHOICES.get(key, (value,)):
            raise ConfigError(
                f"{where}.fsdp.{key} is {value!r}: it must be one of {', '.join(map(str, _CHOICES[key]))}"
            )
    is_sharded = keywords.get("state_dict_type") == "sharded"
    if "sharded_ckpt_prefix_dir" in keywords and not is_sharded:
        raise ConfigError(f"{where}.fsdp.sharded_ckpt_prefix_dir is ignored without state_dict_type: sharded")
    if keywords.get("load_monolith_rank0_only") and is_sharded:
        raise ConfigError(f"{where}.fsdp.load_monolith_rank0_only is for state_dict_type: full, leave it out")
    if trainer.get("precision") is None:
        raise ConfigError(f"missing trainer.precision: {where}.fsdp needs it, such as amp_bf16 (fp32 on the CPU)")


def build_parallelism(
    model: JointModel, trainer: Mapping[str, Any], version: int
) -> dict[str, FSDPConfig | FSDP2Config] | None:
    """Composer's `parallelism_config`, its units marked in the model; None without FSDP, which is DDP.

    Checkpoints are whole unless the yaml says otherwise; Composer's own default is another for each version.

    Args:
        model: Before it is given to the Trainer.
        trainer: The section of the yaml.
        version: 1 or 2, of FSDP.

    Raises:
        ConfigError: There is no GPU.
    """
    config = (trainer.get("parallelism_config") or {}).get("fsdp")
    if config is None:
        return None
    check_device()
    _mark_units(model, version)
    keywords = {"state_dict_type": "full", "mixed_precision": "DEFAULT", **config}
    if version == 1 and keywords["mixed_precision"] != "FULL":
        keywords["mixed_precision"] = _precisions(keywords["mixed_precision"], trainer["precision"])
    return {"fsdp": _CONFIGS[version](**keywords)}


def check_device() -> None:
    """Refuses FSDP on the CPU, where gloo sums the gradients that FSDP2 asks it to average (torch 2.7).

    Raises:
        ConfigError: There is no GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "trainer.parallelism_config.fsdp needs a GPU and none is seen: set trainer.parallelism_config=null, which "
            "trains on the CPU, or look at the driver and CUDA_VISIBLE_DEVICES"
        )


def _precisions(name: str, precision: str) -> dict[str, str]:
    """FSDP1's mixed precision as FSDP2 has it: Composer's names also round buffers, such as the rotary frequencies."""
    return {"param_dtype": precision, "reduce_dtype": precision if name == "PURE" else "float32"}


def _mark_units(model: JointModel, version: int) -> None:
    """Tells Composer which modules to shard each by itself.

    The head's units keep their weights and gradients in the precision that they are stored in: eight bits of a
    bfloat16 box are too few.
    """
    in_full: dict[str, Any] = {"mixed_precision": MixedPrecision()}
    if version == 2:
        in_full = {"mp_policy": MixedPrecisionPolicy()}
        # Composer hands a unit's keywords on to `fully_shard`, but lets none through that takes a policy.
        names = {entry.name for entry in fields(FSDP2Config) if not entry.name.startswith("_")}
        FSDP2Config.settable_attrs = staticmethod(lambda: {*names, "mp_policy"})

    def wrap(module: nn.Module) -> bool | dict[str, Any]:
        return dict(in_full) if isinstance(module, HEAD_UNITS) else isinstance(module, BACKBONE_UNITS)

    model.model.fsdp_wrap_fn = wrap  # pyright: ignore[reportArgumentType]
