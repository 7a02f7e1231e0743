"""Obey SIGTERM: finish the batch, save a checkpoint, end with a status that says to start again."""

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from recipe.checkpoints.save import CheckpointSaver

PREEMPTED = os.EX_TEMPFAIL  # 75: SIGTERM came and all that was done is saved; run the same command again


log = logging.getLogger(__name__)


def exit_on_sigterm() -> None:
    """Until training begins there is nothing to save, so SIGTERM ends the process with `exit_codes.PREEMPTED`."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(PREEMPTED)

    signal.signal(signal.SIGTERM, leave)


def ignore_sigterm() -> None:
    """For a process that leaves with a status of its own: the launcher sends SIGTERM to whoever is not yet gone.

    No other handler would do: as it ends, Python gives all others back.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Preemption(Callback):
    """On SIGTERM to any rank, all ranks save at the end of the batch and exit with `exit_codes.PREEMPTED`.

    During an evaluation the signal is obeyed at its end, which is where the batch's checkpoint is due: a checkpoint
    taken earlier would resume without that evaluation. A run that is at its end just ends.

    Args:
        saver: Writes the checkpoint.
    """

    def __init__(self, saver: CheckpointSaver):
        self.saver = saver
        self.asked = False
        self._before: Any = None

    def init(self, state: State, logger: Logger) -> None:
        """Listens from here on."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """After the batch, its evaluation and its checkpoint."""
        self._obey(state, logger)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """After the evaluation at the end of an epoch."""
        self._obey(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        """Hands the signal back, unless it has come: the launcher sends it again to those not yet gone."""
        if signal.getsignal(signal.SIGTERM) == self._note and not self.asked:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def _obey(self, state: State, logger: Logger) -> None:
        """A few bytes over all ranks; the loss was copied to the host before, so nothing is left to wait for.

        Raises:
            SystemExit: On every rank, after the checkpoint. Composer closes loggers and uploads as the process ends.
        """
        asked = state.device.tensor_to_device(torch.tensor([int(self.asked)]))
        dist.all_reduce(asked, reduce_operation="MAX")
        assert state.max_duration is not None
        if not asked.item() or state.timestamp >= state.max_duration:
            return
        self.saver.save_now(state, logger)
        dist.barrier()  # the launcher ends all ranks as soon as one has exited
        log.warning("SIGTERM: batch %d is saved, the same command goes on from it", state.timestamp.batch.value)
        ignore_sigterm()
        raise SystemExit(PREEMPTED)
