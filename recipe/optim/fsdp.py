"""Configure FSDP through Composer: which modules become units, and in which precision.

`recipe.rules` checks its yaml section, `recipe.checks` whether there is a GPU.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from torch import nn
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, Qwen2_5_VLVisionBlock

from recipe.config import ConfigError
from recipe.models.caption_decoder import CaptionDecoder, CaptionLayer
from recipe.models.detection_head import DecoderLayer, DetectionHead
from recipe.models.memory import MemoryBuilder

# The root holds the rest: token embedding, output matrix, patch embedding, merger, norms.
BACKBONE_UNITS: tuple[type[nn.Module], ...] = (Qwen2_5_VLVisionBlock, Qwen2_5_VLDecoderLayer)
HEAD_UNITS = (MemoryBuilder, DetectionHead, DecoderLayer, CaptionDecoder, CaptionLayer)

FSDP_CONFIGS: Mapping[int, type[FSDPConfig] | type[FSDP2Config]] = {1: FSDPConfig, 2: FSDP2Config}


def build_parallelism(
    network: nn.Module, keywords: Mapping[str, Any] | None, precision: str | None, version: int
) -> dict[str, FSDPConfig | FSDP2Config] | None:
    """Mark the units in the network and return Composer's `parallelism_config`; None means DDP.

    Call it before the model is passed to the Trainer. Checkpoints are whole unless the keywords say otherwise;
    Composer's own default depends on the version. `precision` is the computation's, such as amp_bf16.

    Raises:
        ConfigError: There is no GPU.
    """
    if keywords is None:
        return None
    check_device()
    _mark_units(network, version)
    keywords = {"state_dict_type": "full", "mixed_precision": "DEFAULT", **keywords}
    if version == 1 and keywords["mixed_precision"] != "FULL":
        # As FSDP2 does. Composer's own names would also round buffers, such as the rotary frequencies.
        summed = precision if keywords["mixed_precision"] == "PURE" else "float32"
        keywords["mixed_precision"] = {"param_dtype": precision, "reduce_dtype": summed}
    return {"fsdp": FSDP_CONFIGS[version](**keywords)}


def check_device() -> None:
    """Raise ConfigError if there is no GPU: on the CPU gloo sums the gradients that FSDP2 averages (torch 2.7)."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "trainer.parallelism_config.fsdp needs a GPU, but none is found: set trainer.parallelism_config=null to "
            "train on the CPU, or check the driver and CUDA_VISIBLE_DEVICES"
        )


def _mark_units(network: nn.Module, version: int) -> None:
    """Set the function by which Composer asks which modules are units.

    The head's units keep weights and gradients in their stored precision: the eight bits of a bfloat16 box are too few.
    """
    in_full: dict[str, Any] = {"mixed_precision": MixedPrecision()}
    if version == 2:
        in_full = {"mp_policy": MixedPrecisionPolicy()}
        # Composer passes a unit's keywords to `fully_shard`, but its FSDP2Config lists none for the policy.
        names = {entry.name for entry in fields(FSDP2Config) if not entry.name.startswith("_")}
        FSDP2Config.settable_attrs = staticmethod(lambda: {*names, "mp_policy"})

    def wrap(module: nn.Module) -> bool | dict[str, Any]:
        return dict(in_full) if isinstance(module, HEAD_UNITS) else isinstance(module, BACKBONE_UNITS)

    network.fsdp_wrap_fn = wrap  # pyright: ignore[reportArgumentType]
