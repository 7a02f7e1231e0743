"""Measure how far a step moves each parameter group, and what each loss term contributes."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import torch
from composer import Callback
from composer.core import State, Time, TimeUnit, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from recipe.config import GROUPS, LossConfig
from recipe.joint import JointModel
from recipe.losses.counts import split_batch
from recipe.losses.terms import REPEATS
from recipe.optim.groups import is_8bit, local, named_groups, num_copies, square_sums

# Elements processed at once; the temporary memory is at most four times this. Many on a GPU, so that launches are few;
# on the CPU as many as its caches hold.
PIECE = 2**24
CPU_PIECE = 2**18

WEIGHT = "weight_"
LANGUAGE = ("lm_teacher", "lm_student")

log = logging.getLogger(__name__)


def every_batches(interval: str) -> int:
    """Return 10 for `10ba`; raise ValueError if it is not a number of batches above 0."""
    time = Time.from_timestring(interval)
    if time.unit != TimeUnit.BATCH or time.value < 1:
        raise ValueError(f"interval {interval!r} is not a number of batches above 0: write it like 10ba")
    return time.value


class GroupMetrics(Callback):
    """Logs `weight_norm/{group}` and `update_ratio/{group}` of every parameter group of the optimizer.

    The ratio is the norm of what the step added to the group's weights, over the norm of its weights after the step.
    The update is computed from the optimizer's own state, so no copy of the weights is kept. A parameter that was not
    stepped (frozen, or its batch skipped) adds 0. `recipe.algorithms.nan_rollback` logs gradient norms.

    Args:
        interval: Batches between two measurements, such as `10ba`.
    """

    def __init__(self, interval: str = "10ba"):
        self.num_batches = every_batches(interval)
        self.rates: list[float] = []
        self.updates: list[Tensor] = []  # of 8-bit AdamW, per optimizer group

    def fit_start(self, state: State, logger: Logger) -> None:
        """Raise ValueError if the optimizer is neither a plain AdamW nor the 8-bit one, whose updates are known."""
        optimizer = state.optimizers[0]
        plain = isinstance(optimizer, AdamW) and not any(
            group["amsgrad"] or group["maximize"] for group in optimizer.param_groups
        )
        if not plain and not is_8bit(optimizer):
            raise ValueError(
                f"group_metrics reads the update of AdamW, not of {optimizer}: set callbacks.group_metrics=null"
            )

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Keep the learning rates of this step, before the schedulers change them, and what 8-bit AdamW will add."""
        self.rates, self.updates = [], []
        if (int(state.timestamp.batch) + 1) % self.num_batches == 0:
            optimizer: Any = state.optimizers[0]
            self.rates = [float(group["lr"]) for group in optimizer.param_groups]
            if is_8bit(optimizer):
                from recipe.optim.eight_bit import next_update_square_sum

                self.updates = [next_update_square_sum(optimizer, group) for group in optimizer.param_groups]

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the norms at every `interval`-th step; costs one wait for the device, and one all-reduce under FSDP."""
        if not self.rates:
            return
        optimizer: Any = state.optimizers[0]
        groups = named_groups(optimizer)
        names = list(groups)
        if self.updates:
            weights = square_sums(list(groups.values()), next(state.model.parameters()).device)
            updates = torch.zeros_like(weights)
            for group, added in zip(optimizer.param_groups, self.updates, strict=True):
                updates[names.index(group["name"])] += added.to(updates.device)
            sums = torch.stack([weights, updates])
        else:
            sums = torch.zeros(2, len(names), dtype=torch.float64, device=next(state.model.parameters()).device)
            for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
                sums[:, names.index(group["name"])] += step_square_sums(optimizer, group, rate).to(sums.device)
        if state.fsdp_enabled:
            dist.all_reduce(sums)
            sums /= num_copies(state)
        weight_norms, update_norms = sums.sqrt().tolist()
        metrics: dict[str, float] = {}
        for name, weight, update in zip(names, weight_norms, update_norms, strict=True):
            metrics[f"weight_norm/{name}"] = weight
            metrics[f"update_ratio/{name}"] = update / weight if weight else math.nan
        logger.log_metrics(metrics)


@torch.no_grad()
def step_square_sums(optimizer: AdamW, group: dict[str, Any], rate: float) -> Tensor:
    """Return the squared norms of an optimizer group's weights and of what AdamW's last step added, (2,) float64.

    Both are of this rank's part. With u = rate * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), the step made
    w = (1 - rate * decay) * old - u. So w - old = -(rate * decay * w + u) / (1 - rate * decay), which needs only what
    exists after the step. Call it before the gradients are cleared: a parameter without one was not stepped. `rate` is
    the step's.
    """
    stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
    others = [parameter for parameter in group["params"] if parameter.grad is None]
    sums = square_sums([others, []], group["params"][0].device)
    if not stepped:
        return sums
    states = [optimizer.state[parameter] for parameter in stepped]
    steps = torch.stack([state["step"] for state in states]).tolist()
    beta1, beta2 = group["betas"]
    squares: list[Tensor] = []  # of weights and update of each piece
    tensors = [(local(p), local(s["exp_avg"]), local(s["exp_avg_sq"])) for p, s in zip(stepped, states, strict=True)]
    buffer = tensors[0][0].new_empty(0)
    for weights, means, variances, step in _pieces(tensors, steps):
        # All that reads a piece comes before the next one, so weights and moments are read from memory once.
        bias1, root = 1 - beta1**step, math.sqrt(1 - beta2**step)
        scale = root / bias1  # u = rate * scale * m / (sqrt(v) + floor)
        if len(buffer) < len(weights) or buffer.dtype != weights.dtype:
            buffer = torch.empty_like(weights)
        update = torch.sqrt(variances, out=buffer[: len(weights)]).add_(group["eps"] * root)
        torch.div(means, update, out=update)
        update.add_(weights, alpha=group["weight_decay"] / scale)
        squares += [torch.dot(weights, weights), torch.dot(update, update).mul_(scale**2)]  # twice as fast as norms
    added = torch.stack(squares).double().view(-1, 2).sum(0)
    added[1] *= (rate / (1 - rate * group["weight_decay"])) ** 2
    return sums + added


def _pieces(
    tensors: Sequence[tuple[Tensor, ...]], steps: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """Yield weights and both moments, 1-D, with their step; at most `PIECE` elements, in float32 or wider.

    Small tensors of one step are put together: one call costs as much time as thousands of elements.
    """
    length = min(PIECE, CPU_PIECE) if tensors[0][0].device.type == "cpu" else PIECE
    gathered: list[Sequence[Tensor]] = []
    size, last = 0, steps[0]

    def joined() -> tuple[Tensor, Tensor, Tensor, float]:
        columns = [[row[index] for row in gathered] for index in range(3)]
        weights, means, squares = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in columns)
        dtype = torch.promote_types(weights.dtype, torch.float32)
        return weights.to(dtype), means.to(dtype), squares.to(dtype), last

    for row, step in zip(tensors, steps, strict=True):
        for cut in map(list, zip(*(tensor.flatten().split(length) for tensor in row), strict=True)):
            number = cut[0].numel()
            if gathered and (size + number > length or step != last):
                yield joined()
                gathered, size = [], 0
            gathered.append(cut)
            size, last = size + number, step
    if gathered:
        yield joined()


def joint_model(state: State) -> JointModel:
    """Return the model without DDP's wrapper."""
    model = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
    assert isinstance(model, JointModel)
    return model


def term_weights(config: LossConfig) -> dict[str, float]:
    """Return the weight of every term: {"lm_teacher": 0.3, ...}."""
    return {name.removeprefix(WEIGHT): value for name, value in asdict(config).items() if name.startswith(WEIGHT)}


class LossShares(Callback):
    """Logs `loss/share/{term}`: the weighted term, repeats (earlier layers, denoising) included, over the total.

    Composer logs the unweighted terms as `loss/train/*`.
    """

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the shares of the terms that Composer has averaged over ranks."""
        losses = state.total_loss_dict or {}
        total = float(losses.get("loss/train/total", 0.0))
        if not total:
            return
        weights = term_weights(joint_model(state).loss_config)
        metrics = {}
        for term, weight in weights.items():
            values = [float(losses.get(f"loss/train/loss_{term}{repeat}", 0.0)) for repeat in ("", *REPEATS)]
            metrics[f"loss/share/{term}"] = weight * sum(values) / total
        logger.log_metrics(metrics)


class LossGradients(Callback):
    """Measures whether detection and language pull the shared parameters in different directions.

    Logs, every `interval`, `loss_gradient/{term}`: the norm of the weighted term's gradient on the shared parameters.
    Also logs `loss_gradient/cosine` of the summed language terms with the sum of the others: below 0 they pull apart.

    Measured on the first microbatch of every rank and averaged over ranks; if microbatches are alike, the norms are on
    the scale of the whole batch. Each term takes a forward and a backward pass of that microbatch: with 6 terms and 8
    microbatches per step, a measurement costs three quarters of a step. Choose a long interval. Training is unchanged:
    every random number, gradient, weight and moment is as without it.

    Args:
        interval: Batches between two measurements, such as `500ba`.
        group: The shared parameter group. All that language model and head read of an image passes through the merger.
    """

    def __init__(self, interval: str = "500ba", group: str = "merger"):
        self.num_batches = every_batches(interval)
        if group not in GROUPS:
            raise ValueError(f"loss_gradients.group is {group!r}: it must be one of {', '.join(GROUPS)}")
        self.group = group
        self.has_warned = False

    def batch_start(self, state: State, logger: Logger) -> None:
        """Measure before the step, on all ranks together: each backward pass is averaged over them."""
        if (int(state.timestamp.batch) + 1) % self.num_batches:
            return
        parameters = [p for p in named_groups(state.optimizers[0]).get(self.group, []) if p.requires_grad]
        if not parameters:
            if not self.has_warned:
                log.warning("loss_gradients: the group %s is frozen, so nothing is measured", self.group)
            self.has_warned = True
            return
        weights = term_weights(joint_model(state).loss_config)
        language, others = ([torch.zeros_like(local(p)) for p in parameters] for _ in range(2))
        squares: list[Tensor] = []
        terms = [term for term, weight in weights.items() if weight]
        for gradient, term in zip(self._gradients(state, parameters, terms), terms, strict=True):
            squares.append(_dot(gradient, gradient))
            for total, part in zip(language if term in LANGUAGE else others, gradient, strict=True):
                total += part
        numbers = torch.stack([*squares, _dot(language, others), _dot(language, language), _dot(others, others)])
        if state.fsdp_enabled:
            dist.all_reduce(numbers)
            numbers /= num_copies(state)
        *term_squares, product, language_square, other_square = numbers.tolist()
        metrics = {f"loss_gradient/{term}": square**0.5 for term, square in zip(terms, term_squares, strict=True)}
        if language_square and other_square:
            metrics["loss_gradient/cosine"] = product / (language_square * other_square) ** 0.5
        logger.log_metrics(metrics)

    def _gradients(
        self, state: State, parameters: list[torch.nn.Parameter], terms: list[str]
    ) -> Iterator[list[Tensor]]:
        """Yield this rank's part of the gradient of each term alone; leaves no trace."""
        model = joint_model(state)
        microbatch = split_batch(deepcopy(state.batch), float("inf"))[0]
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        for term in terms:
            with torch.random.fork_rng(devices), only_term(model, term):
                batch = state.device.batch_to_device(deepcopy(microbatch))
                with get_precision_context(state.precision, state.precision_config):
                    # Through the wrapper of DDP or FSDP, which averages the gradients.
                    loss = model.loss(state.model(batch), batch)["total"]
                loss.backward()
            yield [torch.zeros_like(local(p)) if p.grad is None else local(p.grad).clone() for p in parameters]
            for parameter in state.model.parameters():
                parameter.grad = None


@contextmanager
def only_term(model: JointModel, term: str) -> Iterator[None]:
    """Set all other weights to 0; those terms still take part in the backward pass, so no rank waits for another."""
    config = model.loss_config
    zeros = {WEIGHT + other: 0.0 for other in term_weights(config) if other != term}
    model.loss_config = replace(config, **zeros)
    try:
        yield
    finally:
        model.loss_config = config


def _dot(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Return the scalar product over all tensors, () float64; torch adds up in float32 or wider."""
    parts = [torch.dot(a.flatten().to(b.dtype), b.flatten()).double() for a, b in zip(left, right, strict=True)]
    return torch.stack(parts).sum()
