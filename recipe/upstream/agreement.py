"""One rank's error is every rank's error: nobody is left waiting for a rank that has died."""

from collections.abc import Iterator
from typing import Any

import torch
from composer.utils import dist
from torch.utils.data import DataLoader

# Seconds that ranks wait for one another unless `trainer.dist_timeout` says otherwise. Composer's 300 are fewer than
# counting a million samples on one rank takes, or two files of a slow store.
DIST_TIMEOUT = 1800.0


def agree(error: Exception | None) -> None:
    """Called by all ranks at the same point: returns where none has an error, else raises on every rank.

    Raises:
        Exception: This rank's own error.
        RuntimeError: Another rank's, told in its words.
    """
    if dist.get_world_size() > 1:
        failed = torch.tensor([int(error is not None)])
        if "nccl" in torch.distributed.get_backend():
            failed = failed.cuda()
        try:
            dist.all_reduce(failed, reduce_operation="MAX")
        except Exception as lost:  # the others have gone or never come: what began it is the error to tell
            if error is None:
                raise
            raise error from lost
        if failed.item() and error is None:
            told = dist.all_gather_object(None)
            raise RuntimeError("; ".join(f"rank {rank}: {text}" for rank, text in enumerate(told) if text))
        if error is not None:
            dist.all_gather_object(f"{type(error).__name__}: {error}")
    if error is not None:
        raise error


class LockstepLoader(DataLoader):
    """A DataLoader whose errors, a bad shard or sample in any rank's worker, are raised on all ranks at once."""

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The batches; every rank takes the same number of them."""
        batches = super().__iter__()
        while True:
            batch, error = None, None
            try:
                batch = next(batches, None)
            except Exception as raised:  # told to the others, then raised
                error = raised
            agree(error)
            if batch is None:
                return
            yield batch
