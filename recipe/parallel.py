"""FSDP through Composer's own configuration: what becomes a unit, in which precision, and what a yaml may say."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from composer.utils.parallelism import FSDP2Config, FSDPConfig
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, Qwen2_5_VLVisionBlock

from recipe.joint import JointModel
from recipe.models.caption_decoder import CaptionDecoder, CaptionLayer
from recipe.models.detection_head import DecoderLayer, DetectionHead
from recipe.models.memory import MemoryBuilder

# The root holds the rest: token embedding, output matrix, patch embedding, merger, norms.
BACKBONE_UNITS: tuple[type[nn.Module], ...] = (Qwen2_5_VLVisionBlock, Qwen2_5_VLDecoderLayer)
HEAD_UNITS: tuple[type[nn.Module], ...] = (MemoryBuilder, DetectionHead, DecoderLayer, CaptionDecoder, CaptionLayer)

_CHECKPOINTING = "set model.gradient_checkpointing, which also works without FSDP"
_REFUSED: Mapping[str, str] = {
    "activation_checkpointing": _CHECKPOINTING,
    "activation_checkpointing_reentrant": _CHECKPOINTING,
    "device_mesh": "leave it out: Composer makes a mesh of one dimension and overwrites any other",
    "auto_wrap": "leave it out: the units are those of recipe/parallel.py",
    "use_orig_params": "leave it out: parameter groups need it to be true",
    "ignored_modules": "leave it out: nothing is left unsharded",
    "process_group": "leave it out: all ranks share the parameters",
    "te_checkpoint_wrapper": "leave it out: no Transformer Engine layers are used",
    "te_shard_fp8_weight": "leave it out: no Transformer Engine layers are used",
}


def fsdp_keywords(version: int) -> tuple[list[str], Mapping[str, str]]:
    """The keywords that `trainer.parallelism_config.fsdp` takes, and those of Composer that it does not, with why."""
    kind = FSDP2Config if version == 2 else FSDPConfig
    names = [entry.name for entry in fields(kind) if not entry.name.startswith("_")]
    return [name for name in names if name not in _REFUSED], {k: v for k, v in _REFUSED.items() if k in names}


def build_parallelism(config: Mapping[str, Any] | None, version: int) -> dict[str, FSDPConfig | FSDP2Config] | None:
    """Composer's `parallelism_config`; None without FSDP, which is DDP.

    Args:
        config: `trainer.parallelism_config` of the yaml.
        version: 1 or 2, of FSDP.
    """
    if not config or config.get("fsdp") is None:
        return None
    return {"fsdp": (FSDP2Config if version == 2 else FSDPConfig)(**config["fsdp"])}


def mark_units(model: JointModel, version: int) -> None:
    """Tells Composer which modules to shard each by itself.

    The head's units compute in the precision of their own weights: eight bits of a bfloat16 box are too few.

    Args:
        model: Before it is given to the Trainer.
        version: 1 or 2, of FSDP.
    """
    in_full: dict[str, Any] = {"mixed_precision": "FULL"}
    if version == 2:
        in_full = {"mp_policy": MixedPrecisionPolicy()}
        # Composer hands a unit's keywords on to `fully_shard`, but lets none through that takes a policy.
        FSDP2Config.settable_attrs = classmethod(lambda cls: {*(entry.name for entry in fields(cls)), "mp_policy"})

    def wrap(module: nn.Module) -> bool | dict[str, Any]:
        return in_full if isinstance(module, HEAD_UNITS) else isinstance(module, BACKBONE_UNITS)

    model.model.fsdp_wrap_fn = wrap  # pyright: ignore[reportAttributeAccessIssue]
