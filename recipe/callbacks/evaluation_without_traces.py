"""Training goes on after an evaluation as if there had been none."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from torch import Tensor, nn


@dataclass
class _Before:
    """What evaluation changes and Composer does not put back."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: Tensor | None
    modes: list[tuple[nn.Module, bool]]
    batch: Any
    outputs: Any


class EvaluationWithoutTraces(Callback):
    """Puts back the random states of this process, every module's mode, and the state's batch and outputs.

    Each iteration over a data loader draws a seed for its workers from torch's generator: with an evaluation between
    two batches the second would see another dropout. Composer ends an evaluation with `model.train()`, which also
    wakes modules that were in evaluation mode, and leaves its last batch in the state, in the place of the training
    batch. It does put back the loader, its length and the clock. To be the first callback, so that at the end of an
    evaluation the others, which may save a checkpoint, find what was before.
    """

    def __init__(self) -> None:
        self._before: _Before | None = None

    def eval_before_all(self, state: State, logger: Logger) -> None:
        """Before the first evaluator."""
        self._before = _Before(
            python=random.getstate(),
            numpy=np.random.get_state(),
            torch=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
            modes=[(module, module.training) for module in state.model.modules()],
            batch=state.batch,
            outputs=state.outputs,
        )

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """After the last evaluator."""
        before, self._before = self._before, None
        assert before is not None, "an evaluation ended that never began"
        random.setstate(before.python)
        np.random.set_state(before.numpy)
        torch.set_rng_state(before.torch)
        if before.cuda is not None:
            torch.cuda.set_rng_state(before.cuda)
        for module, training in before.modes:
            module.training = training
        state.batch = before.batch
        state.outputs = before.outputs
