"""Let training continue after an evaluation as if there had been none."""

import random
from typing import Any

import numpy as np
import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger


class EvaluationWithoutTraces(Callback):
    """Restores the random states of this process, every module's mode, and the state's batch and outputs.

    Composer restores the loader, its length and the clock, but neither of these:

    - Each iteration over a data loader draws a seed for its workers from torch's generator, so later dropout differs.
    - `model.train()` at the end of an evaluation also switches modules that were in evaluation mode.
    - The last evaluation batch replaces the training batch in the state.

    This must be the first callback, so that others, which may save a checkpoint, see the restored state.
    """

    def __init__(self) -> None:
        self._before: tuple[Any, ...] | None = None

    def eval_before_all(self, state: State, logger: Logger) -> None:
        """Keep what evaluation changes."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        modes = [(module, module.training) for module in state.model.modules()]
        generators = random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda
        self._before = (*generators, modes, state.batch, state.outputs)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Restore it."""
        assert self._before is not None, "an evaluation ended that never began"
        python, numpy, cpu, cuda, modes, state.batch, state.outputs = self._before
        self._before = None
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        for module, training in modes:
            module.training = training
