"""What a run says on the console while it trains; its first and last lines: `recipe.callbacks.summary`."""

import logging
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from composer.core import State, TimeUnit
from composer.loggers import Logger, ProgressBarLogger
from composer.utils import dist, is_notebook

from recipe.metrics.gather import UNDEFINED
from recipe.optim.schedule import position

log = logging.getLogger(__name__)

LINE_EVERY = 20  # steps between progress lines without a terminal
LONGEST_SILENCE = 60.0  # seconds after which a step gets its line anyway

# Names of an evaluation's first lines, in this order, and what they are called there.
HEADLINES = {
    "box_ap50": "box AP50",
    "box_ap": "box AP",
    "category_ap50": "category AP50",
    "caption_match": "captions right",
    "recall": "recall",
    "best_f1": "best F1",
    "text_f1": "F1 of text answers",
    "retention_kl": "KL to the base",
}


SECONDS = "eval/seconds/"  # start of the names under which the times of an evaluation's parts are logged


def headline(scores: Mapping[str, float]) -> str:
    """Return the first scores of an evaluation in one line; `-` for what is not known."""
    words = ", ".join(f"{words} {shown(scores[name])}" for name, words in HEADLINES.items() if name in scores)
    return f"{words} (of {scores['text_answers']:.0f} images)" if scores.get("text_answers") else words


def describe_seconds(seconds: Mapping[str, float]) -> str:
    """Return how long an evaluation took, and its three longest parts."""
    longest = sorted(seconds.items(), key=lambda pair: -pair[1])[:3]
    parts = ", ".join(f"{name} {value:.3g}" for name, value in longest)
    return f"{sum(seconds.values()):.3g} s ({parts})"


def shown(value: float) -> str:
    """Return a score as text: `-` if it is undefined, whole numbers without decimals."""
    if value == UNDEFINED:
        return "-"
    return f"{value:.0f}" if value == int(value) and value > 1 else f"{value:.3f}"


def scores_of(state: State) -> dict[str, float]:
    """Return the scores of the last evaluation."""
    return {name: float(value) for name, value in state.eval_metric_values.items()}


class ProgressLogger(ProgressBarLogger):
    """Composer's progress bar, redrawn once per step; without a terminal a line every `LINE_EVERY` steps.

    Composer 0.32 redraws the bar for every logged dictionary, about 20 times per step.
    """

    def __init__(self):
        super().__init__(sys.stderr)
        self.hparams_already_logged_to_console = True  # config.yaml has them
        self._has_terminal = is_notebook() or sys.stderr.isatty()
        self._postfix: dict[str, str] = {}
        self._seconds: dict[str, float] = {}  # of each part of the last evaluation
        self._begun: int | None = None  # the first step of `fit`
        self._last = self._start = time.monotonic()

    @property
    def show_pbar(self) -> bool:
        """Whether bars are drawn."""
        return self._has_terminal and super().show_pbar

    def init(self, state: State, logger: Logger) -> None:
        """Draw nothing yet."""
        self.state = state

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start the clock."""
        self._begun = int(state.timestamp.batch)
        self._last = self._start = time.monotonic()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep the loss, which the bar shows at its next redraw, and the times of an evaluation."""
        seconds = {name: float(value) for name, value in metrics.items() if name.startswith(SECONDS)}
        if seconds:
            self._seconds = {name.removeprefix(SECONDS): value for name, value in seconds.items()}
        if "loss/train/total" in metrics:
            self._postfix = {"loss": f"{float(metrics['loss/train/total']):.4g}"}
            if self.train_pbar is not None:
                self.train_pbar.pbar.set_postfix(self._postfix, refresh=False)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Move the bar, or print a line if one is due."""
        super().batch_end(state, logger)
        batch, now = int(state.timestamp.batch), time.monotonic()
        done = batch - (self._begun or 0)
        is_due = batch % LINE_EVERY == 0 or done == 1 or now - self._last > LONGEST_SILENCE
        if self._has_terminal or not is_due or dist.get_global_rank() != 0:
            return
        self._last = now
        pace = (now - self._start) / done
        # Not Composer's `get_elapsed_duration`, which counts whole epochs if the duration is in epochs.
        share = 0.0 if state.max_duration is None else position(TimeUnit.DURATION, state)
        steps_left = batch / share - batch if share else 0
        left = f", {timedelta(seconds=round(pace * steps_left))} left" if steps_left else ""
        loss = f", loss {self._postfix['loss']}" if self._postfix else ""
        log.info("step %d (%.0f %%)%s, %.3g s per step%s", batch, 100 * share, loss, pace, left)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Close the bar; log the headline if this is part of a training run."""
        super().eval_end(state, logger)
        if dist.get_global_rank() == 0 and self._begun is not None:
            words, seconds = headline(scores_of(state)), describe_seconds(self._seconds)
            log.info("evaluation at step %d: %s; %s", int(state.timestamp.batch), words, seconds)

    # The bar belongs to the console, not to the run: a checkpoint that held it would redraw it on resume.
    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore what Composer's own bar has saved."""


def short(number: float) -> str:
    """Return 1234567 as 1.2 M."""
    for factor, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(int(number))
