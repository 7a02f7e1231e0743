"""Compute norms of parameter groups, for parameters that are whole on every rank or sharded over ranks."""

from collections.abc import Sequence
from functools import reduce

import torch
from composer.core import State
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

from recipe.upstream.torch_private import foreach_norm


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, sharing its memory, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(state: State) -> bool:
    """Return whether each rank holds a part of the parameters (FSDP), so that sums need an all-reduce."""
    return state.fsdp_enabled


def named_groups(optimizer: Optimizer) -> dict[str, list[Parameter]]:
    """Return the optimizer's parameters by group `name`, with and without weight decay together."""
    groups: dict[str, list[Parameter]] = {}
    for group in optimizer.param_groups:
        groups.setdefault(group["name"], []).extend(group["params"])
    return groups


@torch.no_grad()
def square_sums(lists: Sequence[Sequence[Tensor]], device: torch.device | str = "cpu") -> Tensor:
    """Return the sum of squares of this rank's part of each list: (len(lists),) float64, 0 for an empty list."""
    sums = []
    for tensors in lists:
        parts = [part for part in map(local, tensors) if part.numel()]
        if parts:
            # Norms in at least float32: the square of a bfloat16 norm has three digits.
            dtype = reduce(torch.promote_types, {part.dtype for part in parts}, torch.float32)
            norms = torch.stack(list(foreach_norm(parts, 2, dtype=dtype)))
            sums.append(norms.double().square().sum())
        else:
            sums.append(torch.zeros((), dtype=torch.float64, device=device))
    return torch.stack(sums)
