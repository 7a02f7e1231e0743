"""Log how large each parameter group is, and how much of it a step moves."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from composer import Callback
from composer.core import State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.optim import AdamW

from recipe.optim.groups import local, named_groups, square_sums
from recipe.upstream.torch_private import foreach_add_, foreach_addcdiv_, foreach_mul, foreach_norm, foreach_sqrt

# Elements processed at once; the temporary memory is twice this. Many on a GPU, so that launches are few; on the CPU as
# many as its caches hold.
PIECE = 2**25
CPU_PIECE = 2**18


def every_batches(interval: str) -> int:
    """Return 10 for `10ba`; raise ValueError if it is not a number of batches above 0."""
    time = Time.from_timestring(interval)
    if time.unit != TimeUnit.BATCH or time.value < 1:
        raise ValueError(f"interval {interval!r} is not a number of batches above 0: write it like 10ba")
    return time.value


class GroupMetrics(Callback):
    """Logs `weight_norm/{group}` and `update_ratio/{group}` of every parameter group of the optimizer.

    The ratio is the norm of what the step added to the group's weights, over the norm of its weights after the step.
    The update is computed from AdamW's own state, so no copy of the weights is kept. A parameter that was not stepped
    (frozen, or its batch skipped) adds 0. `recipe.algorithms.nan_rollback` logs gradient norms.

    Args:
        interval: Batches between two measurements, such as `10ba`.
    """

    def __init__(self, interval: str = "10ba"):
        self.num_batches = every_batches(interval)
        self.rates: list[float] = []

    def fit_start(self, state: State, logger: Logger) -> None:
        """Raise ValueError if the optimizer is not a plain AdamW, the one whose update is known."""
        optimizer = state.optimizers[0]
        plain = isinstance(optimizer, AdamW) and not any(
            group["amsgrad"] or group["maximize"] for group in optimizer.param_groups
        )
        if not plain:
            raise ValueError(
                f"group_metrics reads the update of AdamW, not of {optimizer}: set callbacks.group_metrics=null"
            )

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Keep the learning rates of this step, before the schedulers change them."""
        self.rates = []
        if (int(state.timestamp.batch) + 1) % self.num_batches == 0:
            self.rates = [float(group["lr"]) for group in state.optimizers[0].param_groups]

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the norms at every `interval`-th step; costs one wait for the device, and one all-reduce under FSDP."""
        if not self.rates:
            return
        optimizer = state.optimizers[0]
        assert isinstance(optimizer, AdamW)
        groups = named_groups(optimizer)
        names = list(groups)
        weights = square_sums(list(groups.values()), next(state.model.parameters()).device)
        updates = torch.zeros_like(weights)
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            updates[names.index(group["name"])] += update_square_sum(optimizer, group, rate).to(updates.device)
        sums = torch.stack([weights, updates])
        if state.fsdp_enabled:
            dist.all_reduce(sums)
        weight_norms, update_norms = sums.sqrt().tolist()
        metrics: dict[str, float] = {}
        for name, weight, update in zip(names, weight_norms, update_norms, strict=True):
            metrics[f"weight_norm/{name}"] = weight
            metrics[f"update_ratio/{name}"] = update / weight if weight else math.nan
        logger.log_metrics(metrics)


@torch.no_grad()
def update_square_sum(optimizer: AdamW, group: dict[str, Any], rate: float) -> Tensor:
    """Return the squared norm of what AdamW's last step added to this rank's part of an optimizer group, () float64.

    With u = rate * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), the step made w = (1 - rate * decay) * old - u.
    So w - old = -(rate * decay * w + u) / (1 - rate * decay), which needs only what exists after the step.

    Args:
        optimizer: After its step, gradients not yet cleared: a parameter without one was not stepped.
        group: One of its groups.
        rate: The learning rate of the step.
    """
    stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
    if not stepped:
        return torch.zeros((), dtype=torch.float64)
    states = [optimizer.state[parameter] for parameter in stepped]
    steps = torch.stack([state["step"] for state in states]).tolist()
    beta1, beta2 = group["betas"]
    shrink = rate * group["weight_decay"]
    norms: list[Tensor] = []
    tensors = [(local(p), local(s["exp_avg"]), local(s["exp_avg_sq"])) for p, s in zip(stepped, states, strict=True)]
    for weights, means, squares, counts in _pieces(tensors, steps):
        # u = scale * m / (sqrt(v) + floor)
        roots = [math.sqrt(1 - beta2**step) for step in counts]
        scales = [rate * root / (1 - beta1**step) for root, step in zip(roots, counts, strict=True)]
        denominators = foreach_sqrt(list(squares))
        foreach_add_(denominators, [group["eps"] * root for root in roots])
        updates = foreach_mul(list(weights), shrink)
        foreach_addcdiv_(updates, list(means), denominators, scales)
        norms += foreach_norm(updates)
    return torch.stack(norms).double().square().sum() / (1 - shrink) ** 2


def _pieces(
    tensors: Sequence[tuple[Tensor, ...]], steps: Sequence[float]
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...], list[float]]]:
    """Yield weights, both moments and steps, cut and gathered to about `PIECE` elements, in float32 or wider."""
    device = tensors[0][0].device
    length = min(PIECE, CPU_PIECE) if device.type == "cpu" else PIECE
    gathered: list[tuple[Tensor, ...]] = []
    counts: list[float] = []
    size = 0
    for row, step in zip(tensors, steps, strict=True):
        for cut in zip(*(tensor.flatten().split(length) for tensor in row), strict=True):
            number = cut[0].numel()
            if size and size + number > length:
                weights, means, squares = zip(*gathered, strict=True)
                yield weights, means, squares, counts
                gathered, counts, size = [], [], 0
            gathered.append(tuple(part.to(torch.promote_types(part.dtype, torch.float32)) for part in cut))
            counts.append(step)
            size += number
    if gathered:
        weights, means, squares = zip(*gathered, strict=True)
        yield weights, means, squares, counts
