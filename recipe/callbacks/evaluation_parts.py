"""Decide what an evaluation of a training run computes, log the scores by category, and how long each part takes."""

import logging

import torch
from composer import Callback
from composer.core import State, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch.utils.data import DataLoader
from torchmetrics import Metric

from recipe.callbacks.progress import SECONDS
from recipe.data.evaluation import ALL
from recipe.data.stream import PackStream
from recipe.joint import EvaluationScope
from recipe.metrics.categories import CategoryReport, report_categories
from recipe.metrics.gather import Evaluation, MetricEntry

log = logging.getLogger(__name__)

# In the order of an evaluation. data: waiting for the loader; forward: losses too; scoring: tables too.
PARTS = ("data", "forward", "captions", "classes", "answers", "drawing", "retention", "scoring")


class EvaluationParts(Callback):
    """Leaves out of an evaluation what is not asked for, and logs where its time goes.

    The last evaluation of a run computes everything, as does one outside a run.

    Logs `eval/seconds/{part}` of the rank that took longest, and the tables `eval/categories` and `eval/confusion` if
    there are scores by category for them.

    Args:
        scope: Of the model.
        score_threshold: Least score of an object in the confusions.
        last_answered: Of `put_answered_first`; None: there are no text answers, or all samples get one.
        every_class: Whether every evaluation has scores by category and their tables.
        category_scores: Whether every evaluation has the scores, such as `category_ap`.
        metric: By which the best checkpoint is chosen.
    """

    def __init__(
        self,
        scope: EvaluationScope,
        score_threshold: float,
        last_answered: int | None = None,
        every_class: bool = False,
        category_scores: bool = False,
        metric: str | None = None,
    ):
        self.metric = metric
        self.scope = scope
        self.score_threshold = score_threshold
        self.last_answered = last_answered
        self.every_class = every_class
        self.category_scores = category_scores or every_class
        self.report: CategoryReport | None = None  # of the last evaluation, on rank 0
        self.seconds: dict[str, float] = {}  # of the last evaluation
        self._with_tables = True
        self._entries: dict[str, Metric] = {}
        self._evaluated: tuple[int, bool] | None = None  # batch of the last evaluation of a run, and if it had all

    def fit_start(self, state: State, logger: Logger) -> None:
        """Warn if checkpoints are compared by other images than the last one."""
        is_of_answers = (self.metric or "").removeprefix("eval/").startswith("text_")
        if is_of_answers and self.last_answered not in (None, ALL) and dist.get_global_rank() == 0:
            log.warning(
                "save_best.metric %s is of some images, and at the last evaluation of all, which do not compare: set "
                "evaluation.answers.images to the size of the evaluation set",
                self.metric,
            )

    def eval_before_all(self, state: State, logger: Logger) -> None:
        """Choose what the evaluation computes; its scores replace those of the one before."""
        is_last = is_at_end(state)
        self._evaluated = int(state.timestamp.batch), is_last
        self._with_tables = is_last or self.every_class
        self.scope.last_answered = None if is_last else self.last_answered
        self.scope.with_categories = is_last or self.category_scores
        self._entries = self._entries or dict(state.eval_metrics["eval"])
        source = evaluation_of(state)
        source.with_categories = self.scope.with_categories
        left_out = () if source.with_categories else source.category_names
        state.eval_metrics["eval"] = {name: entry for name, entry in self._entries.items() if name not in left_out}
        state.eval_metric_values.clear()

    def eval_start(self, state: State, logger: Logger) -> None:
        """Start the clock."""
        self.report = None
        self.scope.start()

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        """The batch is there."""
        self.scope.lap("data")

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """The metrics have it."""
        self.scope.lap("scoring")

    def eval_end(self, state: State, logger: Logger) -> None:
        """Log the tables and the seconds; one all-reduce."""
        source = evaluation_of(state)
        if self._with_tables and source.category_names and dist.get_global_rank() == 0:
            rows = source.evaluated
            predictions, samples = [row for _, row, _ in rows], [sample for _, _, sample in rows]
            self.report = report_categories(predictions, samples, self.score_threshold)
            log_categories(logger, self.report)
        self.scope.lap("scoring")
        longest = torch.tensor([self.scope.seconds[part] for part in PARTS], dtype=torch.float64)
        longest = state.device.tensor_to_device(longest)
        dist.all_reduce(longest, reduce_operation="MAX")
        self.seconds = {part: value for part, value in zip(PARTS, longest.tolist(), strict=True) if value}
        logger.log_metrics({SECONDS + part: value for part, value in self.seconds.items()})

    def fit_end(self, state: State, logger: Logger) -> None:
        """Say so if the run was stopped at an evaluation that was not to be its last."""
        if self._evaluated == (int(state.timestamp.batch), False) and dist.get_global_rank() == 0:
            some = "not all images, " if self.last_answered not in (None, ALL) else ""
            log.info("the run was stopped: its last evaluation answered %shad no tables by category", some)


def is_at_end(state: State) -> bool:
    """Return whether no batch of the run follows."""
    now, end = state.timestamp, state.max_duration
    assert end is not None
    if end.unit == TimeUnit.EPOCH and int(now.batch_in_epoch) and int(now.epoch) + 1 == end.value:
        # After the batch that ends an epoch the clock says so later, but an evaluation of the batch is not repeated.
        loader = state.train_dataloader
        assert isinstance(loader, DataLoader) and isinstance(loader.dataset, PackStream)
        loader.dataset.epoch_of_length = int(now.epoch)  # as it is, but after a resume
        return int(now.batch_in_epoch) >= len(loader)
    return now >= end


def evaluation_of(state: State) -> Evaluation:
    """Return what holds all predictions and samples that were evaluated last."""
    entry = next(iter(state.eval_metrics["eval"].values()))
    assert isinstance(entry, MetricEntry)
    return entry.source


def log_categories(logger: Logger, report: CategoryReport) -> None:
    """Log the scores of each category and the confusions as tables."""
    rows = [[name, *vars(scores).values()] for name, scores in report.scores.items()]
    logger.log_table(["category", "truths", "ap", "ap50", "recall"], rows, name="eval/categories")
    rows = [[true, found, count] for (true, found), count in report.confusion.items()]
    logger.log_table(["true", "found", "count"], rows, name="eval/confusion")
