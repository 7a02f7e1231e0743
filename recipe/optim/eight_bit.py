"""AdamW with moments of 8 bits, by bitsandbytes: `optimizer.moments: 8bit`. Imported only by runs that ask for it.

A moment of a parameter with at least 4,096 numbers takes one byte per number and four per block of 256; smaller
parameters keep float32. bitsandbytes' state of a parameter is `state1`, `state2` and an integer `step`, and of an
8-bit one `absmax1`, `absmax2` (scales of blocks) and `qmap1`, `qmap2` (the numbers that a byte encodes).
"""

from typing import Any

import torch
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.optim.adamw import AdamW8bit
from torch import Tensor

_BLOCK = 256


def moments(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return a parameter's two moments in float32, in its shape."""
    if "absmax1" not in state:
        return state["state1"], state["state2"]
    first, second = (
        dequantize_blockwise(state[f"state{n}"], absmax=state[f"absmax{n}"], code=state[f"qmap{n}"], blocksize=_BLOCK)
        for n in (1, 2)
    )
    return first, second


@torch.no_grad()
def next_update_square_sum(optimizer: AdamW8bit, group: dict[str, Any]) -> Tensor:
    """Return the squared norm of what the next step will add to an optimizer group, () float64.

    Unlike AdamW's, it cannot be computed after the step: a stored moment may be 0 that was not when the step used it.
    A parameter without a gradient is not stepped.
    """
    beta1, beta2 = group["betas"]
    total = torch.zeros((), dtype=torch.float64)
    for parameter in (parameter for parameter in group["params"] if parameter.grad is not None):
        state = optimizer.state[parameter]
        gradient, step = parameter.grad.float(), state["step"] + 1
        mean, square = moments(state)
        mean = torch.lerp(gradient, mean, beta1) / (1 - beta1**step)
        square = torch.lerp(gradient.square(), square, beta2) / (1 - beta2**step)
        update = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * parameter.float()
        norm = torch.linalg.vector_norm(group["lr"] * update)
        total = total.to(norm.device) + norm.double().square()
    return total
