"""glibc's heap next to a large model on a CPU.

Freed blocks of up to 32 MB stay in the heap, and small blocks that live on, such as gradients of adapters, are cut from
them, so the next layer's blocks no longer fit: a backward pass of the 3B with adapters grew from 10 to over 18 GB
(glibc's threshold for mapped blocks is raised to the largest one freed; mallopt(3)).
"""

import ctypes

import torch
from torch import nn

_M_MMAP_THRESHOLD = -3  # of malloc.h
_MAPPED = 2**20  # bytes from which a block is mapped, and so given back when it is freed
LARGE = 2**30  # bytes of weights; below, the pages of mapped blocks cost more than they save


def give_back_freed_blocks(model: nn.Module) -> bool:
    """Map large blocks, which are given back when freed, if a model is large and on a CPU; return whether it is set."""
    if torch.cuda.is_available() or sum(weight.nbytes for weight in model.parameters()) < LARGE:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _MAPPED))
