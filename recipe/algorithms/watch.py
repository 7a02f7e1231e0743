"""Watch losses, outputs and gradients for non-finite values and for trends over batches."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recipe.config import NaNRollbackConfig
from recipe.schema import JointOutputs
from recipe.upstream.torch_private import foreach_mul, foreach_norm

MAD_TO_SIGMA = 1.4826  # of a normal distribution
LEAST_SPREAD = 1e-3  # in medians: among equal losses, any other would be a spike


class Action(IntEnum):
    """Name what a watcher asks for, the mildest first."""

    LOG = 0
    SKIP = 1
    ROLLBACK = 2


class Reading(NamedTuple):
    """Hold one batch's numbers, reduced over ranks."""

    is_finite: bool  # losses, head outputs and gradients
    loss: float  # the total
    gradient_norm: float  # of all groups, before clipping


class Watch:
    """Remember the last batches and return which watchers a new one triggers; a watcher that is None never does."""

    def __init__(self, config: NaNRollbackConfig):
        self.config = config
        counts = [item.count for item in (config.consecutive_nan, config.consecutive_zero_losses) if item]
        windows = [item.window for item in (config.nan_ratio, config.gradient_explosion, config.loss_spike) if item]
        self.readings: deque[Reading] = deque(maxlen=max([1, *counts, *windows]))

    def alarms(self, now: Reading) -> dict[str, Action]:
        """Add a batch and return the action of every watcher that it triggers."""
        past = list(self.readings)
        self.readings.append(now)
        readings = [*past, now]
        config, found = self.config, dict[str, str]()
        if (nan := config.consecutive_nan) and consecutive(readings, lambda item: not item.is_finite) >= nan.count:
            found["consecutive_nan"] = nan.action
        if (ratio := config.nan_ratio) and not now.is_finite and nan_ratio(readings, ratio.window) >= ratio.ratio:
            found["nan_ratio"] = ratio.action
        zero = config.consecutive_zero_losses
        if zero and consecutive(readings, lambda item: item.loss == 0) >= zero.count:
            found["consecutive_zero_losses"] = zero.action
        if now.is_finite:
            if explosion := config.gradient_explosion:
                norms = finite_values(past, explosion.window, lambda item: item.gradient_norm)
                if is_explosion(now.gradient_norm, norms, explosion.factor):
                    found["gradient_explosion"] = explosion.action
            if spike := config.loss_spike:
                losses = finite_values(past, spike.window, lambda item: item.loss)
                if losses and robust_z_score(now.loss, losses) > spike.z_score:
                    found["loss_spike"] = spike.action
        return {name: Action[action.upper()] for name, action in found.items()}

    def state_dict(self) -> list[list[Any]]:
        """Return the remembered batches, as JSON can hold them."""
        return [list(item) for item in self.readings]

    def load_state_dict(self, state: list[list[Any]]) -> None:
        """Restore the remembered batches."""
        self.readings.clear()
        self.readings.extend(Reading(*item) for item in state)


def consecutive(readings: Sequence[Reading], holds: Callable[[Reading], bool]) -> int:
    """Return for how many readings in a row, up to the last, `holds` is true."""
    return sum(1 for _ in takewhile(holds, reversed(readings)))


def nan_ratio(readings: Sequence[Reading], window: int) -> float:
    """Return the share of the last `window` batches that were not finite; missing batches count as finite."""
    return sum(not item.is_finite for item in readings[-window:]) / window


def finite_values(readings: Sequence[Reading], window: int, value: Callable[[Reading], float]) -> list[float]:
    """Return the values of the finite ones of the last `window` readings; [] if they fill less than half of it."""
    values = [value(item) for item in readings[-window:] if item.is_finite]
    return values if 2 * len(values) >= window else []


def is_explosion(norm: float, past: Sequence[float], factor: float) -> bool:
    """Return whether a gradient norm exceeds `factor` times the past median; False if there is none or it is 0."""
    return bool(past) and norm > factor * statistics.median(past) > 0


def robust_z_score(value: float, past: Sequence[float]) -> float:
    """Return how many standard deviations a value is above the median of at least one past value.

    The deviation is robust: 1.4826 median absolute deviations, but at least a thousandth of the median.
    """
    median = statistics.median(past)
    deviation = MAD_TO_SIGMA * statistics.median(abs(item - median) for item in past)
    deviation = max(deviation, LEAST_SPREAD * abs(median))
    if deviation == 0:
        return math.inf if value > median else 0.0
    return (value - median) / deviation


class MicrobatchFlags:
    """Keep one microbatch's values, small tensors, to check all at once: cheaper than one by one."""

    def __init__(self, sample_ids: Sequence[str]):
        self.sample_ids = list(sample_ids)
        self._values: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Keep the values."""
        self._values.update({name: value.detach() for name, value in values.items()})

    def add_gradients(self, outputs: Mapping[str, Tensor]) -> None:
        """Keep the outputs' gradients when the backward pass computes them."""
        for name, output in outputs.items():
            if output.requires_grad:
                output.register_hook(partial(self._keep_gradient, f"gradient of {name}"))

    def _keep_gradient(self, name: str, gradient: Tensor) -> None:
        self._values[name] = gradient.detach()

    def count(self) -> Tensor:
        """Return the number of values that are not finite: () float64 on the device."""
        return _not_finite(list(self._values.values())).sum(dtype=torch.float64)

    def names(self) -> list[str]:
        """Return the names of the values that are not finite; waits for the device."""
        raised = _not_finite(list(self._values.values())).tolist()
        return [name for name, flag in zip(self._values, raised, strict=True) if flag]


def head_outputs(outputs: Any) -> dict[str, Tensor]:
    """Return every layer's boxes and objectness, for object and denoising queries; {} for another model's outputs."""
    if not isinstance(outputs, JointOutputs):
        return {}
    named = {}
    for suffix, detection in (("", outputs.detection), ("_dn", outputs.denoising and outputs.denoising[1])):
        if detection is not None:
            for index, (repeat, layer) in enumerate(detection.layers()):
                named[f"pred_boxes{suffix or repeat} of layer {index}"] = layer.pred_boxes
                named[f"pred_objectness{suffix or repeat} of layer {index}"] = layer.pred_objectness
    return {name: value for name, value in named.items() if value.numel()}


def _not_finite(values: list[Tensor]) -> Tensor:
    """Return which values are not finite: (len(values),) bool."""
    # 0 times a finite number is 0, else NaN: two fused passes that cannot overflow.
    zeros = foreach_mul(values, 0.0)
    return torch.isnan(torch.stack(list(foreach_norm(zeros))))
