"""Handle SIGTERM and Ctrl-C: finish the batch, save a checkpoint, exit with a status that says to start again."""

import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from recipe.checkpoints.save import CheckpointSaver

PREEMPTED = os.EX_TEMPFAIL  # 75: SIGTERM came and all progress is saved; run the same command again

log = logging.getLogger(__name__)


def exit_on_sigterm() -> None:
    """Exit with `PREEMPTED` on SIGTERM until training begins: there is nothing to save yet."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(PREEMPTED))


def ignore_sigterm() -> None:
    """Ignore SIGTERM in a process that exits with its own status: the launcher sends it to all that still run.

    Only SIG_IGN works, since Python restores all other handlers as it exits.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Preemption(Callback):
    """Save on all ranks at the end of the batch after SIGTERM or Ctrl-C to any rank, and exit with `PREEMPTED`.

    A second Ctrl-C ends the process at once.

    During an evaluation this waits for its end, when the batch's checkpoint is due: an earlier checkpoint would resume
    without that evaluation. A run that has reached `max_duration` ends as usual.
    """

    def __init__(self, saver: CheckpointSaver):
        self.saver = saver
        self.asked = False
        self._process = os.getpid()
        self._before: Any = None
        self._before_interrupt: Any = None

    def init(self, state: State, logger: Logger) -> None:
        """Start listening."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
            self._before_interrupt = signal.signal(signal.SIGINT, self._note_interrupt)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save and exit if asked, after the batch, its evaluation and its checkpoint.

        An all-reduce of a few bytes; the loss was copied to the host before, so nothing is left to wait for.

        Raises:
            SystemExit: On every rank, after the checkpoint. Composer closes loggers and uploads as the process ends.
        """
        asked = state.device.tensor_to_device(torch.tensor([int(self.asked)]))
        dist.all_reduce(asked, reduce_operation="MAX")
        assert state.max_duration is not None
        if not asked.item() or state.timestamp >= state.max_duration:
            return
        self.saver.save_now(state, logger)
        dist.barrier()  # the launcher kills all ranks as soon as one has exited
        log.warning(
            "SIGTERM or Ctrl-C: batch %d is saved; run the same command to continue from it",
            state.timestamp.batch.value,
        )
        ignore_sigterm()
        raise SystemExit(PREEMPTED)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save and exit if asked, after the evaluation at the end of an epoch."""
        self.batch_checkpoint(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        """Restore the handler, unless SIGTERM has come: the launcher sends it again to all that still run."""
        if signal.getsignal(signal.SIGTERM) == self._note and not self.asked:
            signal.signal(signal.SIGTERM, self._before)
        if signal.getsignal(signal.SIGINT) == self._note_interrupt:
            signal.signal(signal.SIGINT, self._before_interrupt)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def _note_interrupt(self, number: int, frame: FrameType | None) -> None:
        # Workers inherit this handler: a terminal's Ctrl-C reaches them too, and must not end them before the batch.
        self.asked = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if os.getpid() == self._process:
            text = "Ctrl-C: training ends after this batch, with a checkpoint; again: at once, without one\n"
            os.write(2, text.encode())  # logging may be in the middle of a line
