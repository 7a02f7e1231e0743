"""What torch 2.6 to 2.15 offers under private names only. Delete an entry once torch has a public one.

- `torch._foreach_*`: operations over lists of tensors in one launch; its documentation calls them beta.
- `torch.utils._pytree`: how FSDP2 finds tensors in nested structures; dataclasses must be registered.
- FSDP1 keeps a root unit's gathered weights after a forward pass without a backward pass, and has no public `reshard`.
- A DataLoader with persistent workers (`DataLoader._iterator`) cannot start new ones.
"""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.utils._pytree import register_dataclass as register_dataclass
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils.data import DataLoader

# pyright: reportPrivateImportUsage=false
foreach_copy_ = torch._foreach_copy_
foreach_lerp_ = torch._foreach_lerp_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm


def reshard(root: nn.Module) -> None:
    """Free a root unit's gathered weights, which FSDP keeps after a forward pass without a backward pass.

    The next forward pass would compute with these: stale after a rollback or after their group was frozen.
    """
    if isinstance(root, FSDPModule):
        root.reshard()
    elif isinstance(root, FullyShardedDataParallel) and root._handle is not None and root._handle.uses_sharded_strategy:
        _reshard(root, root._handle, free_unsharded_flat_param=True)


def restart_workers(loader: DataLoader) -> None:
    """Start new workers at the next epoch: persistent ones keep an old copy of the data set."""
    loader._iterator = None
