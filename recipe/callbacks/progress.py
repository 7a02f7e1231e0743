"""What a run says on the console: five lines at the start, its progress, six lines at the end."""

import logging
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from composer import Callback
from composer.core import State
from composer.loggers import Logger, ProgressBarLogger
from composer.utils import dist, is_notebook
from torch.utils.data import DataLoader

from recipe.callbacks.memory import MemoryPeaks
from recipe.config import SchedulerConfig
from recipe.data.stream import PackStream
from recipe.metrics.gather import UNDEFINED
from recipe.optim.groups import num_parameters
from recipe.optim.schedule import Schedule, long_warmups, trained_steps

log = logging.getLogger(__name__)

LINE_EVERY = 20  # steps between progress lines without a terminal
LONGEST_SILENCE = 60.0  # seconds after which a step gets its line anyway
FEW_STEPS = 500  # fewer teach a new head little
OFTEN = 200  # passes over a set, after which it is learned by heart

# Names of an evaluation's first lines, in this order, and what they are called there.
HEADLINES = {
    "box_ap50": "box AP50",
    "box_ap": "box AP",
    "category_ap50": "category AP50",
    "caption_match": "captions right",
    "recall": "recall",
    "best_f1": "best F1",
    "text_f1": "F1 of text answers",
}


def headline(scores: Mapping[str, float]) -> str:
    """Return the first scores of an evaluation in one line; `-` for what is not known."""
    return ", ".join(f"{words} {shown(scores[name])}" for name, words in HEADLINES.items() if name in scores)


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
        """Keep the loss; the bar shows it at its next redraw."""
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
        elapsed = state.get_elapsed_duration()
        share = 0.0 if elapsed is None else float(elapsed.value)
        steps_left = batch / share - batch if share else 0
        left = f", {timedelta(seconds=round(pace * steps_left))} left" if steps_left else ""
        loss = f", loss {self._postfix['loss']}" if self._postfix else ""
        log.info("step %d (%.0f %%)%s, %.3g s per step%s", batch, 100 * share, loss, pace, left)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Close the bar; log the headline if this is part of a training run."""
        super().eval_end(state, logger)
        if dist.get_global_rank() == 0 and self._begun is not None:
            log.info("evaluation at step %d: %s", int(state.timestamp.batch), headline(scores_of(state)))

    # The bar belongs to the console, not to the run: a checkpoint that held it would redraw it on resume.
    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore what Composer's own bar has saved."""


class Summary(Callback):
    """Logs what a run is about to do in five lines, and what it did in six.

    Args:
        run_folder: Where the run writes.
        save_folder: Where checkpoints go; None: none are saved.
        eval_interval: As configured: a duration, or a number of epochs.
        scheduler: Warm-ups that are longer than the run are reported.
        schedule: Says in which steps the head learns.
    """

    def __init__(
        self,
        run_folder: str,
        save_folder: str | None,
        eval_interval: str | int,
        scheduler: SchedulerConfig,
        schedule: Schedule,
    ):
        self.scheduler = scheduler
        self.schedule = schedule
        self.run_folder = run_folder
        self.save_folder = save_folder
        self.eval_interval = eval_interval if isinstance(eval_interval, str) else f"{eval_interval}ep"
        self._start = (0, 0.0)  # step and time
        self._memory = MemoryPeaks()

    def batch_start(self, state: State, logger: Logger) -> None:
        """Note where a stage begins, for its peak of memory."""
        self._memory.batch_start(state)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Log the first lines. Collective under FSDP."""
        loader, duration, begun = state.train_dataloader, state.max_duration, int(state.timestamp.batch)
        assert isinstance(loader, DataLoader) and isinstance(loader.dataset, PackStream) and duration is not None
        self._start = (begun, time.monotonic())
        num_samples = int(loader.dataset.is_trained.sum())
        num_packs = loader.dataset.plan(int(state.timestamp.epoch)).num_packs
        packs = "" if num_packs == num_samples else f" in {num_packs} packs"
        # Unknown if the run's duration is in samples, tokens or seconds.
        per_epoch = int(state.dataloader_len or 0)
        length = {"ba": 1, "ep": per_epoch}.get(duration.unit.value)
        steps = int(duration.value) * length if length else None
        origin = f", resumed at step {begun}" if begun else ""
        rates = {group["name"]: group["initial_lr"] for group in state.optimizers[0].param_groups}
        seen = learned = None
        if steps and per_epoch:
            seen = steps / per_epoch
            if "detection" in rates:
                learned = trained_steps(self.schedule.stages.get("detection", ()), steps, per_epoch)
        sizes, num_others = num_parameters(state)
        groups = ", ".join(f"{name} {short(size)} at {rates[name]:g}" for name, size in sizes.items())
        trained = sum(sizes.values())
        processes = dist.get_world_size()
        each = f"{processes} processes" if processes > 1 else "1 process"
        checkpoints = "no checkpoints" if self.save_folder is None else f"checkpoints in {self.save_folder}"
        if dist.get_global_rank() != 0:
            return
        lines = [
            f"  data        {num_samples} samples{packs}, {len(loader)} steps per epoch"
            + (f"; each is seen {seen:.3g} times" if seen else ""),
            f"  steps       {duration}"
            + (f" = {steps} steps" if steps else "")
            + ("" if learned is None else f", the head learns in {learned}")
            + f"{origin}; evaluation every {self.eval_interval}",
            f"  trains      {groups}; {short(trained)} of {short(trained + num_others)} parameters",
            f"  runs on     {each}, {state.device.name}, {state.precision.value}",
            f"  writes      {self.run_folder}: config.yaml, metrics.jsonl, images; {checkpoints}",
        ]
        log.info("this run\n%s", "\n".join(lines))
        for warmup in long_warmups(self.scheduler, duration, per_epoch):
            log.warning("%s is longer than the run, %s: the full rate is never reached; shorten it", warmup, duration)
        if learned is not None and learned < FEW_STEPS:
            log.warning(
                "the head learns in %d steps, a new one needs %d or more: raise trainer.max_duration or lower "
                "train_loader.global_batch_size",
                learned,
                FEW_STEPS,
            )
        if seen is not None and seen > OFTEN:
            log.warning(
                "each sample is seen %.0f times, more than %d teaches little more: lower trainer.max_duration or "
                "convert more images",
                seen,
                OFTEN,
            )

    def fit_end(self, state: State, logger: Logger) -> None:
        """Log the last lines. Collective."""
        memory = self._memory.describe(state)
        if dist.get_global_rank() != 0:
            return
        step, start = self._start
        done, seconds = int(state.timestamp.batch) - step, time.monotonic() - start
        pace = f" ({seconds / done:.3g} s per step)" if done else ""
        newest = "none saved" if self.save_folder is None else f"{self.save_folder}/latest-rank0.pt"
        scores = scores_of(state)
        lines = [
            f"  done        step {int(state.timestamp.batch)} after {timedelta(seconds=round(seconds))}{pace}",
            f"  evaluation  {headline(scores) if scores else 'none yet'}",
            f"  memory      {memory}",
            f"  checkpoint  {newest}",
            f"  results     {self.run_folder}: metrics.jsonl, curves.png, images, config.yaml",
            f"  next        python recipe/predict.py --checkpoint {newest} --out predictions IMAGES",
        ]
        log.info("this run has ended\n%s", "\n".join(lines[: 5 if self.save_folder is None else 6]))


def short(number: float) -> str:
    """Return 1234567 as 1.2 M."""
    for factor, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(int(number))
