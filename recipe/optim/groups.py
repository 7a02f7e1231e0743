"""Assign parameters to groups by name, build AdamW with a learning rate per group, and measure its groups."""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from recipe.config import OptimizerConfig
from recipe.families import MERGERS
from recipe.models.network import AVERAGE
from recipe.models.nf4 import num_weights
from recipe.upstream.torch_private import foreach_norm

if TYPE_CHECKING:
    from composer.core import State

log = logging.getLogger(__name__)

_PIECE = 2**24  # numbers

_MERGER = rf"({'|'.join(MERGERS)})\."

# A parameter belongs to the one group whose pattern is found in its name. The vision pattern excludes mergers. What
# peft adds has `lora_` in its name (lora_A, lora_B, lora_magnitude_vector); the weight it adapts is a `base_layer`.
GROUP_PATTERNS: Mapping[str, str] = {
    "vision": rf"\bhf_model\.model\.visual\.(?!{_MERGER}|.*\.lora_)",
    "merger": rf"\bhf_model\.model\.visual\.{_MERGER}",
    "llm": r"\bhf_model\.(model\.language_model|lm_head)\.(?!.*\.lora_)",
    "lora_vision": r"\bhf_model\.model\.visual\..*\.lora_",
    "lora_llm": r"\bhf_model\.model\.language_model\..*\.lora_",
    "adapter": r"^(model\.)?memory\.",
    "detection": r"^(model\.)?(detection_head|caption_decoder)\.",
}


def group_of(name: str, patterns: Mapping[str, str] = GROUP_PATTERNS) -> str:
    """Return the group of a parameter; raise KeyError unless exactly one pattern matches its name."""
    claims = [group for group, pattern in patterns.items() if re.search(pattern, name)]
    if len(claims) != 1:
        found = f"claimed by {claims}" if claims else "claimed by none"
        raise KeyError(f"parameter {name} is {found} of the groups {list(patterns)}: fix GROUP_PATTERNS")
    return claims[0]


def group_parameters(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Return the parameters of the groups that have any, in the model's order; averages are left out, ties are once."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {group: [] for group in GROUP_PATTERNS}
    for name, parameter in model.named_parameters():
        if not name.removeprefix("model.").startswith(AVERAGE):
            groups[group_of(name)].append((name, parameter))
    return {group: members for group, members in groups.items() if members}


def lr_scale(config: OptimizerConfig, tokens_per_batch: float) -> float:
    """Return the factor on all learning rates by `lr_scaling`: 1, linear in the batch's tokens, or their square root.

    `tokens_per_batch` counts real tokens per optimizer step over all ranks; NaN if not counted.

    Raises:
        ValueError: The rule needs a number that is missing.
    """
    if config.lr_scaling == "none":
        return 1.0
    if not config.reference_tokens or not tokens_per_batch > 0:
        raise ValueError(
            f"optimizer.lr_scaling={config.lr_scaling} needs optimizer.reference_tokens (is {config.reference_tokens}) "
            f"and the tokens per batch (are {tokens_per_batch}): set reference_tokens, or lr_scaling=none"
        )
    ratio = tokens_per_batch / config.reference_tokens
    return ratio if config.lr_scaling == "linear" else ratio**0.5


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, tokens_per_batch: Callable[[], float] | None = None
) -> Optimizer:
    """Return AdamW over the groups whose rate is not 0; freeze the others with `requires_grad_(False)`.

    It is torch's, or bitsandbytes' with moments of 8 bits.

    Matrices decay, vectors (biases, norms) do not, so a group may become two optimizer groups; both carry its `name`.
    `tokens_per_batch` is only counted if the rates depend on it.

    Raises:
        KeyError: A parameter belongs to no group or to several.
    """
    counted = float("nan") if config.lr_scaling == "none" or tokens_per_batch is None else tokens_per_batch()
    scale = lr_scale(config, counted)
    optimizer_groups = []
    for group, members in group_parameters(model).items():
        lr = getattr(config, f"lr_{group}") * scale
        for _, parameter in members:
            parameter.requires_grad_(lr > 0)
        if lr == 0:
            continue
        for decays in (True, False):
            parameters = [parameter for _, parameter in members if (parameter.ndim > 1) == decays]
            if parameters:
                weight_decay = config.weight_decay if decays else 0.0
                optimizer_groups.append({"params": parameters, "lr": lr, "weight_decay": weight_decay, "name": group})
    if config.lr_scaling != "none":
        text = "learning rates x %g: lr_scaling %s of %g tokens per step over %s"
        log.info(text, scale, config.lr_scaling, counted, config.reference_tokens)
    kind, keywords = AdamW, {}
    if config.moments == "8bit":
        from recipe.optim.eight_bit import AdamW8bit as kind
    elif all(_is_whole_on_cpu(parameter) for group in optimizer_groups for parameter in group["params"]):
        # On a CPU torch's default makes some ten calls per parameter: three times as slow for small ones.
        keywords = {"fused": True}
    kind: Any
    return kind(optimizer_groups, lr=0.0, betas=(config.betas[0], config.betas[1]), eps=config.eps, **keywords)


def _is_whole_on_cpu(parameter: Tensor) -> bool:
    return parameter.device.type == "cpu" and not isinstance(parameter, DTensor)


def begin_moments(optimizer: Any) -> None:
    """Give every parameter that has no state the one that the optimizer would create in its first step."""
    for index, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            # Under FSDP1 a rank may hold no part of a parameter; then no state is saved.
            if optimizer.state.get(parameter) or not parameter.numel():
                continue
            if isinstance(optimizer, AdamW):
                optimizer.state[parameter] = {
                    "step": torch.tensor(0.0, dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
            else:
                optimizer.init_state(group, parameter, index, place)


def is_8bit(optimizer: Optimizer) -> bool:
    """Return whether an optimizer is AdamW with moments of 8 bits."""
    return type(optimizer).__name__ == "AdamW8bit"  # its class would import bitsandbytes


def named_groups(optimizer: Optimizer) -> dict[str, list[nn.Parameter]]:
    """Return the optimizer's parameters by group `name`, with and without weight decay together."""
    groups: dict[str, list[nn.Parameter]] = {}
    for group in optimizer.param_groups:
        groups.setdefault(group["name"], []).extend(group["params"])
    return groups


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, sharing its memory, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_copies(state: "State") -> int:
    """Return how many ranks hold the same part of the weights, and so add the same to a sum over all ranks.

    Under DDP these are all ranks, under FSDP one, under hybrid sharding one per group of ranks.
    """
    from composer.utils import dist  # takes seconds to import, which prediction can do without

    if not state.fsdp_enabled:
        return dist.get_world_size()
    return 1 if state.device_mesh is None else math.prod(state.device_mesh.shape[:-1])  # the last one shards


def num_parameters(state: "State") -> tuple[dict[str, int], int]:
    """Return the number of parameters of each optimizer group and of all others; an all-reduce under FSDP."""
    from composer.utils import dist  # takes seconds to import, which prediction can do without

    groups = named_groups(state.optimizers[0])
    held = {id(parameter) for members in groups.values() for parameter in members}
    others = [num_weights(name, local(p)) for name, p in state.model.named_parameters() if id(p) not in held]
    counts = [sum(local(parameter).numel() for parameter in members) for members in groups.values()] + [sum(others)]
    sums = state.device.tensor_to_device(torch.tensor(counts))
    if state.fsdp_enabled:
        dist.all_reduce(sums)
        sums //= num_copies(state)
    *counts, num_others = sums.tolist()
    return dict(zip(groups, counts, strict=True)), num_others


def _norms_of_copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return norms of pieces of the tensors, each copied in another precision into one buffer.

    A CPU converts all of a tensor at once, which takes 1.2 GB for the 3B's token embedding, and the holes that such
    copies leave in the heap add up to several GB.
    """
    buffer = torch.empty(min(_PIECE, max((tensor.numel() for tensor in tensors), default=0)), dtype=dtype)
    pieces = (piece for tensor in tensors for piece in tensor.flatten().split(_PIECE))
    return [torch.linalg.vector_norm(buffer[: len(piece)].copy_(piece)) for piece in pieces]


@torch.no_grad()
def square_sums(lists: Sequence[Sequence[Tensor]], device: torch.device | str = "cpu") -> Tensor:
    """Return the sum of squares of this rank's part of each list: (len(lists),) float64, 0 for an empty list."""
    sums = []
    for tensors in lists:
        parts = [part for part in map(local, tensors) if part.numel()]
        if parts:
            # Norms in at least float32: the square of a bfloat16 norm has three digits.
            dtype = reduce(torch.promote_types, {part.dtype for part in parts}, torch.float32)
            copied = [part for part in parts if part.dtype != dtype and not part.is_cuda]
            direct = [part for part in parts if part.dtype == dtype or part.is_cuda]
            norms = list(foreach_norm(direct, 2, dtype=dtype)) if direct else []
            norms = torch.stack([*norms, *_norms_of_copies(copied, dtype)])
            sums.append(norms.double().square().sum())
        else:
            sums.append(torch.zeros((), dtype=torch.float64, device=device))
    return torch.stack(sums)
