"""One rank's error is every rank's error: no rank waits for one that has died.

torch 2.7 and Composer 0.32: if one rank raises, the others wait in their next collective until `dist_timeout`, and then
report the timeout instead of the error. Delete once Composer's Trainer raises a rank's loading error on all ranks.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from composer.utils import dist
from torch.utils.data import DataLoader

from recipe.config import ConfigError
from recipe.upstream.killed_worker import end_if_killed, explained

Made = TypeVar("Made")

# Seconds that ranks wait for one another, unless `trainer.dist_timeout` is set. Composer's 300 are too few to count a
# million samples on one rank, or to fetch two files from a slow store.
DIST_TIMEOUT = 1800.0


def agree(error: Exception | None) -> None:
    """Raise on every rank if any has an error; all ranks must call it at the same point.

    Raises:
        Exception: This rank's own error.
        ConfigError: Another rank's.
        RuntimeError: Quotes the errors of other ranks.
    """
    if dist.get_world_size() > 1:
        failed = torch.tensor([int(error is not None)])
        if "nccl" in torch.distributed.get_backend():
            failed = failed.cuda()
        try:
            dist.all_reduce(failed, reduce_operation="MAX")
        except Exception as lost:  # other ranks are missing: raise the error that came first
            if error is None:
                raise
            raise error from lost
        if failed.item() and error is None:
            others: list[Any] = dist.all_gather_object(None)
            mistakes = [text for text, is_mistake in filter(None, others) if is_mistake]
            if mistakes:
                raise ConfigError(mistakes[0])
            texts = [f"rank {rank}: {other[0]}" for rank, other in enumerate(others) if other]
            raise RuntimeError("; ".join(texts))
        if error is not None:
            is_mistake = isinstance(error, ConfigError)
            dist.all_gather_object((str(error) if is_mistake else f"{type(error).__name__}: {error}", is_mistake))
    if error is not None:
        raise error


def from_rank_0(make: Callable[[], Made]) -> Made:
    """Return what global rank 0 makes, broadcast to all ranks, which must all call; its error is raised on all."""
    made: list[Any] = [None]
    error = None
    if dist.get_global_rank() == 0:
        try:
            made[0] = make()
        except Exception as raised:  # raised by agree
            error = raised
    agree(error)
    dist.broadcast_object_list(made)
    return made[0]


class LockstepLoader(DataLoader):
    """A DataLoader that raises the error of any rank's worker, such as a bad shard, on all ranks."""

    def _get_iterator(self) -> Any:
        batches = super()._get_iterator()
        end_if_killed(getattr(batches, "_workers", ()))
        return batches

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Yield the batches; every rank must have equally many."""
        batches = super().__iter__()
        while True:
            batch, error = None, None
            try:
                batch = next(batches, None)
            except Exception as raised:  # raised by agree
                error = explained(raised, getattr(batches, "_workers", ()))
            agree(error)
            if batch is None:
                return
            yield batch
