"""FSDP through Composer's own configuration: what becomes a unit, in which precision, and what a yaml may say."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from composer.utils.parallelism import FSDP2Config, FSDPConfig
from torch import nn
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, Qwen2_5_VLVisionBlock

from recipe.joint import JointModel
from recipe.models.caption_decoder import CaptionDecoder, CaptionLayer
from recipe.models.detection_head import DecoderLayer, DetectionHead
from recipe.models.memory import MemoryBuilder

# The root holds the rest: token embedding, output matrix, patch embedding, merger, norms.
BACKBONE_UNITS: tuple[type[nn.Module], ...] = (Qwen2_5_VLVisionBlock, Qwen2_5_VLDecoderLayer)
HEAD_UNITS: tuple[type[nn.Module], ...] = (MemoryBuilder, DetectionHead, DecoderLayer, CaptionDecoder, CaptionLayer)

_CHECKPOINTING = "set model.gradient_checkpointing, which also works without FSDP"
_ONE_MESH = "leave it out: the parameters are sharded over all ranks, and norms are summed over them"
_NO_ENGINE = "leave it out: no Transformer Engine layers are used"
_REFUSED: Mapping[str, str] = {
    "activation_checkpointing": _CHECKPOINTING,
    "activation_checkpointing_reentrant": _CHECKPOINTING,
    "activation_cpu_offload": "it renames the parameters; " + _CHECKPOINTING,
    "auto_wrap": "leave it out: the units are those of recipe/parallel.py",
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
FSDP_CHOICES: Mapping[str, tuple[str, ...]] = {
    "mixed_precision": ("DEFAULT", "PURE", "FULL"),
    "sharding_strategy": ("FULL_SHARD", "SHARD_GRAD_OP"),
    "state_dict_type": ("full", "sharded"),
}


def fsdp_keywords(version: int) -> tuple[list[str], Mapping[str, str]]:
    """The keywords that `trainer.parallelism_config.fsdp` takes, and those of Composer that it does not, with why."""
    kind = FSDP2Config if version == 2 else FSDPConfig
    names = [entry.name for entry in fields(kind) if not entry.name.startswith("_")]
    return [name for name in names if name not in _REFUSED], {k: v for k, v in _REFUSED.items() if k in names}


def build_parallelism(trainer: Mapping[str, Any], version: int) -> dict[str, FSDPConfig | FSDP2Config] | None:
    """Composer's `parallelism_config`; None without FSDP, which is DDP.

    Args:
        trainer: The section of the yaml.
        version: 1 or 2, of FSDP.
    """
    keywords = (trainer.get("parallelism_config") or {}).get("fsdp")
    if keywords is None:
        return None
    if version == 2:
        return {"fsdp": FSDP2Config(**keywords)}
    return {"fsdp": FSDPConfig(**{**keywords, "mixed_precision": _precisions(keywords, trainer)})}


def _precisions(keywords: Mapping[str, Any], trainer: Mapping[str, Any]) -> str | dict[str, Any]:
    """FSDP1's mixed precision as FSDP2 has it: Composer's names also round buffers, such as the rotary frequencies."""
    name = keywords.get("mixed_precision", "DEFAULT")
    if name == "FULL":
        return name
    precision = trainer["precision"]
    return {"param_dtype": precision, "reduce_dtype": precision if name == "PURE" else "float32"}


def mark_units(model: JointModel, version: int) -> None:
    """Tells Composer which modules to shard each by itself.

    The head's units keep their weights and gradients in the precision that they are stored in: eight bits of a
    bfloat16 box are too few.

    Args:
        model: Before it is given to the Trainer.
        version: 1 or 2, of FSDP.
    """
    in_full: dict[str, Any] = {"mixed_precision": MixedPrecision()}
    if version == 2:
        in_full = {"mp_policy": MixedPrecisionPolicy()}
        # Composer hands a unit's keywords on to `fully_shard`, but lets none through that takes a policy.
        FSDP2Config.settable_attrs = classmethod(lambda cls: {*(entry.name for entry in fields(cls)), "mp_policy"})

    def wrap(module: nn.Module) -> bool | dict[str, Any]:
        return dict(in_full) if isinstance(module, HEAD_UNITS) else isinstance(module, BACKBONE_UNITS)

    model.model.fsdp_wrap_fn = wrap  # pyright: ignore[reportAttributeAccessIssue]
