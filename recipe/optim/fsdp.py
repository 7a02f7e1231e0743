"""Configure FSDP through Composer: which modules become units, in which precision, and how they get their weights.

`recipe.rules` checks its yaml section, `recipe.checks` whether there is a GPU.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from recipe.config import ConfigError
from recipe.families import FAMILIES
from recipe.models.caption_decoder import CaptionDecoder, CaptionLayer
from recipe.models.detection_head import DecoderLayer, DetectionHead
from recipe.models.memory import MemoryBuilder
from recipe.upstream.hybrid_sharding import HybridFSDP2Config
from recipe.upstream.trainer_section import shards_and_replicas

# The root holds the rest: token embedding, output matrix, patch embedding, merger, norms.
BACKBONE_UNITS = {unit for family in FAMILIES.values() for unit in family.units}
HEAD_UNITS = (MemoryBuilder, DetectionHead, DecoderLayer, CaptionDecoder, CaptionLayer)

FSDP_CONFIGS: Mapping[int, type[FSDPConfig] | type[FSDP2Config]] = {1: FSDPConfig, 2: HybridFSDP2Config}
# FSDP1's strategies that do the same within a group of ranks.
HYBRID: Mapping[str, str] = {"FULL_SHARD": "HYBRID_SHARD", "SHARD_GRAD_OP": "_HYBRID_SHARD_ZERO2"}


def build_parallelism(
    network: nn.Module, keywords: Mapping[str, Any] | None, precision: str | None, version: int
) -> dict[str, FSDPConfig | FSDP2Config] | None:
    """Mark the units in the network and return Composer's `parallelism_config`; None means DDP.

    Call it before the model is passed to the Trainer. Checkpoints are whole unless the keywords say otherwise;
    Composer's own default depends on the version. `precision` is the computation's, such as amp_bf16.

    Raises:
        ConfigError: There is no GPU, or the degrees do not fit the ranks.
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
    shards, replicas = shards_and_replicas(keywords, dist.get_world_size())
    keywords["data_parallel_shard_degree"] = shards
    keywords["data_parallel_replicate_degree"] = replicas if replicas > 1 else None  # None: a mesh of one dimension
    if version == 1 and replicas > 1:  # Composer would choose the same, with a warning
        keywords["sharding_strategy"] = HYBRID[keywords.get("sharding_strategy", "FULL_SHARD")]
    return {"fsdp": FSDP_CONFIGS[version](**keywords)}


def fill_unit_by_unit(network: nn.Module, part: nn.Module, dtype: torch.dtype) -> None:
    """Move a part's weights to the meta device, from where Composer fills each unit on its GPU as it shards it.

    So no rank holds the part in `dtype` as a whole, neither in the host's memory nor in the GPU's. Weights that are
    mapped from a file are in memory once per machine, as the file's pages.

    Args:
        network: What becomes `JointModel.model`; gets the function `param_init_fn` that Composer calls.
        part: Of the network. Tied weights stay tied.
        dtype: In which the weights are trained; they are converted as they are filled.
    """
    sources: dict[tuple[nn.Module, str], Tensor] = {}
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for module in part.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            sources[module, name] = weight.detach()
            if weight not in moved:
                empty = torch.empty_like(weight, dtype=dtype, device="meta")
                moved[weight] = nn.Parameter(empty, requires_grad=weight.requires_grad)
            setattr(module, name, moved[weight])

    @torch.no_grad()
    def fill(module: nn.Module) -> None:
        for name, weight in module.named_parameters(recurse=False):
            source = sources.pop((module, name)).to(weight.device)
            if isinstance(weight, DTensor):  # FSDP2 fills after it has sharded; each rank cuts its own shard
                source = distribute_tensor(source, weight.device_mesh, weight.placements, src_data_rank=None)
            weight.copy_(source)

    network.param_init_fn = fill  # pyright: ignore[reportArgumentType]


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
        return dict(in_full) if isinstance(module, HEAD_UNITS) else type(module).__name__ in BACKBONE_UNITS

    network.fsdp_wrap_fn = wrap  # pyright: ignore[reportArgumentType]
