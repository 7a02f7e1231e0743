"""Watch memory: a warning and a cache release near the end of a GPU's, and the peak of each stage of a run."""

import logging
import resource
import sys

import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist
from jaxtyping import Float
from torch import Tensor

from recipe.config import ConfigError
from recipe.optim.groups import named_groups

log = logging.getLogger(__name__)

GIB = 2**30
STEPS_BETWEEN = 50  # releases; each makes the next step ask the driver for its memory again


class MemoryBounds(Callback):
    """Warns when a GPU is nearly full, then gives the allocator's unused memory back between two steps.

    Each rank judges its own GPU after every step, other processes on it included. Without a GPU it does nothing.

    Args:
        warn_share: Share of the GPU's memory in use from which a warning is logged, once.
        release_share: Share from which the cache is released, at most once in `STEPS_BETWEEN` steps.
    """

    def __init__(self, warn_share: float = 0.9, release_share: float = 0.95):
        if not 0 < warn_share <= release_share <= 1:
            raise ConfigError(
                f"callbacks.memory_bounds: warn_share is {warn_share} and release_share {release_share}: both must be "
                "above 0 and at most 1, and warn_share not above release_share"
            )
        self.warn_share = warn_share
        self.release_share = release_share
        self._has_warned = False
        self._released: int | None = None  # the step of the last release

    def batch_end(self, state: State, logger: Logger) -> None:
        """Judge the memory in use; the step's gradients and moments are there."""
        if state.device.name != "gpu":
            return
        step, used = int(state.timestamp.batch), _used_share()
        if used >= self.warn_share and not self._has_warned:
            self._has_warned = True
            log.warning(
                "GPU memory of rank %d is %.0f %% full after step %d (memory_bounds.warn_share %g): lower "
                "train_loader.packing.max_tokens or max_seq_len, or set model.gradient_checkpointing=true",
                *(dist.get_global_rank(), 100 * used, step, self.warn_share),
            )
        if used >= self.release_share and (self._released is None or step - self._released >= STEPS_BETWEEN):
            self._released = step
            torch.cuda.empty_cache()
            log.warning(
                "GPU memory of rank %d was %.0f %% full after step %d: released the allocator's cache, now %.0f %%",
                *(dist.get_global_rank(), 100 * used, step, 100 * _used_share()),
            )


def _used_share() -> float:
    free, total = torch.cuda.mem_get_info()
    return 1 - free / total


class MemoryPeaks:
    """The peak of each stage: from one change of the trained groups to the next, since this start.

    On a GPU the allocator's peak is set back at each stage. The peak of a process on a CPU cannot be, so there is one.
    """

    def __init__(self) -> None:
        self._groups: tuple[str, ...] | None = None
        self._starts: list[int] = []  # step at which each stage began
        self._peaks: list[list[float]] = []  # GiB of tensors, and with the allocator's cache, of the stages that ended

    def batch_start(self, state: State) -> None:
        """Begin a stage if other groups are trained; stages have been set by now."""
        groups = named_groups(state.optimizers[0]).items()
        trained = tuple(name for name, members in groups if any(member.requires_grad for member in members))
        if state.device.name != "gpu" or trained == self._groups:
            return
        if self._groups is not None:
            self._peaks.append(_cuda_peak())
        torch.cuda.reset_peak_memory_stats()
        self._groups = trained
        self._starts.append(int(state.timestamp.batch))

    def largest(self, state: State) -> Float[Tensor, "stage kind"]:
        """Return the largest peaks of all ranks, which must all call it, in GiB.

        A GPU has a row per stage: tensors, and these with the allocator's cache; a CPU one number.
        """
        peaks = [*self._peaks, _cuda_peak()] if self._groups is not None else [[_process_peak()]]
        largest = state.device.tensor_to_device(torch.tensor(peaks))
        dist.all_reduce(largest, reduce_operation="MAX")
        return largest

    def describe(self, largest: Float[Tensor, "stage kind"]) -> str:
        """Return the result of `largest` in words."""
        if self._groups is None:
            return f"peak {largest.item():.3g} GiB per process"
        stages = [
            f"{tensors:.3g} ({cached:.3g}) from step {start}"
            for start, (tensors, cached) in zip(self._starts, largest.tolist(), strict=True)
        ]
        return f"peak GiB per GPU, with the allocator's cache in brackets: {', '.join(stages)}"


def _cuda_peak() -> list[float]:
    return [torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB]


def _process_peak() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB  # macOS counts bytes
