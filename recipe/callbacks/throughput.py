"""How much of the device a run uses: FLOPs, their share of the peak, and the time spent waiting for the loader."""

from time import perf_counter

import torch
from composer import Callback
from composer.callbacks.speed_monitor import get_gpu_flops_available
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from recipe.callbacks.flops import PARTS, step_flops
from recipe.callbacks.group_metrics import every_batches
from recipe.callbacks.loss_terms import joint_model
from recipe.optim.groups import named_groups


class Throughput(Callback):
    """Counts FLOPs and time between the request for a batch and the batch's end; evaluation and saving stay out.

    Logged every `interval`, of the steps since the last time and over all ranks:
        flops/step/{vision,merger,llm,detection}: of one step, forward and backward, nothing that is computed twice.
        flops/per_second: the same over all parts.
        flops/hardware_per_second: with what gradient checkpointing computes twice.
        mfu: `flops/per_second` over the peak of all devices; only where the peak is known.
        data/stall_share: share of the time in which the rank waited for its loader.

    Args:
        interval: Number of batches, such as `10ba`.
        peak_flops_per_second: Of one device, dense, in the run's precision. Default: Composer's table of devices, which
            says so where it does not know one.
    """

    def __init__(self, interval: str = "10ba", peak_flops_per_second: float | None = None):
        self.num_batches = every_batches(interval)
        self.peak = peak_flops_per_second
        self._reset()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Looks the device up."""
        if self.peak is None:
            self.peak = float(get_gpu_flops_available(state))

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """A batch is asked for."""
        self.asked = perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """It is there."""
        self.stalled += perf_counter() - self.asked

    def batch_start(self, state: State, logger: Logger) -> None:
        """Counts on the host, before the batch is moved; what is frozen in this step is frozen by now."""
        groups = named_groups(state.optimizers[0]).items()
        trained = {name for name, parameters in groups if any(parameter.requires_grad for parameter in parameters)}
        flops = step_flops(joint_model(state).model, state.batch, trained)
        for index, part in enumerate(PARTS):
            self.model_flops[index] += flops.model[part]
            self.hardware_flops += flops.model[part] + flops.recompute[part]

    def batch_end(self, state: State, logger: Logger) -> None:
        """Logs every `interval`: one all-reduce."""
        self.seconds += perf_counter() - self.asked
        self.steps += 1
        if int(state.timestamp.batch) % self.num_batches:
            return
        own = [*self.model_flops, self.hardware_flops, self.stalled, self.seconds]
        sums = state.device.tensor_to_device(torch.tensor(own, dtype=torch.float64))
        dist.all_reduce(sums)
        *parts, hardware, stalled, rank_seconds = sums.tolist()
        seconds = rank_seconds / dist.get_world_size()
        metrics = {f"flops/step/{part}": value / self.steps for part, value in zip(PARTS, parts, strict=True)}
        metrics["flops/per_second"] = sum(parts) / seconds
        metrics["flops/hardware_per_second"] = hardware / seconds
        metrics["data/stall_share"] = stalled / rank_seconds
        if self.peak:
            metrics["mfu"] = sum(parts) / (rank_seconds * self.peak)
        logger.log_metrics(metrics)
        self._reset()

    def _reset(self) -> None:
        self.model_flops = [0.0] * len(PARTS)
        self.hardware_flops = 0.0
        self.steps = 0
        self.stalled = 0.0
        self.seconds = 0.0
        self.asked = perf_counter()
