"""Norms of parameter groups, the same whether the parameters are whole on every rank or sharded over them."""

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
    """This rank's part of a tensor: the shard of a DTensor, else the tensor itself. It shares their memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(state: State) -> bool:
    """Whether each rank holds a part of the parameters (FSDP), so that sums over them are summed over ranks."""
    return state.fsdp_enabled


def named_groups(optimizer: Optimizer) -> dict[str, list[Parameter]]:
    """The optimizer's parameters by the `name` of their group, in its order; decayed and not decayed ones together."""
    groups: dict[str, list[Parameter]] = {}
    for group in optimizer.param_groups:
        groups.setdefault(group["name"], []).extend(group["params"])
    return groups


@torch.no_grad()
def square_sums(lists: Sequence[Sequence[Tensor]], device: torch.device | str = "cpu") -> Tensor:
    """The sum of squares of this rank's part of each list of tensors.

    Args:
        lists: Of floating-point tensors; a list may be empty.
        device: Of the result.

    Returns:
        (len(lists),) float64; not finite where a tensor is not.
    """
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
