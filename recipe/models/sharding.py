"""What sharding (FSDP) requires of the model: every rank runs every unit equally often, or all wait indefinitely."""

from typing import Generic, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from recipe.upstream.torch_private import reshard_fsdp1

Content = TypeVar("Content")


class Sealed(Generic[Content]):
    """Hide a root unit's input from FSDP, which rounds all it finds to the weights' precision, even target boxes."""

    def __init__(self, content: Content):
        self.content = content


def is_sharded(module: nn.Module) -> bool:
    """Return whether other ranks hold parts of a module's parameters."""
    units = (FSDPModule, FullyShardedDataParallel)
    return distributed.is_initialized() and any(isinstance(part, units) for part in module.modules())


def reshard(root: nn.Module) -> None:
    """Free a root unit's gathered weights, which FSDP keeps after a forward pass without a backward pass.

    The next forward pass would compute with these: stale after a rollback or after their group was frozen.
    """
    if isinstance(root, FSDPModule):
        root.reshard()
    else:
        reshard_fsdp1(root)


def on_all_ranks(condition: bool, device: torch.device) -> bool:
    """Return whether `condition` holds on every rank; called by all ranks at the same point."""
    flag = torch.tensor(int(condition), device=device)
    if distributed.is_initialized():
        distributed.all_reduce(flag, distributed.ReduceOp.MIN)
    return bool(flag)
