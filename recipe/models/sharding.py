"""What sharding (FSDP) asks of the model: every rank runs every unit equally often, or all wait indefinitely."""

from typing import Generic, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from recipe.upstream.torch_private import reshard_fsdp1

Content = TypeVar("Content")


class Sealed(Generic[Content]):
    """Carries a root unit's input past FSDP, which rounds all it finds to the weights' precision: target boxes too."""

    def __init__(self, content: Content):
        self.content = content


def is_sharded(module: nn.Module) -> bool:
    """Return whether other ranks hold parts of a module's parameters."""
    return distributed.is_initialized() and any(
        isinstance(part, FSDPModule | FullyShardedDataParallel) for part in module.modules()
    )


def reshard(root: nn.Module) -> None:
    """Gives a root unit's gathered weights back, which FSDP keeps after a forward pass that no backward pass follows.

    The next forward pass would compute with them: with those of before a rollback, or before their group was frozen.
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
