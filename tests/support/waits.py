"""Count what a GPU would have to wait for."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"nonzero", "_local_scalar_dense", "bincount", "masked_select", "_unique2", "equal", "is_nonzero"}


class Waits(TorchDispatchMode):
    """Counts the operations after which a GPU's host must know a value before it can continue."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name.startswith(("index", "_index")) and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if name in WAITS or masks:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))
