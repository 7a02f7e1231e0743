"""Report and bound the samples that an evaluation skips."""

import logging

from composer import Callback
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from recipe.schema import Batch

log = logging.getLogger(__name__)


class SkippedSamples:
    """Collects the samples that a loader skips, and reports them over all ranks, each once, with the reason.

    Args:
        where: The loader's key.
        max_bad_samples: One more skipped sample in an evaluation, over all ranks, stops the run.
        name: Under which their number is logged.
    """

    def __init__(self, where: str, max_bad_samples: int, name: str):
        self.where = where
        self.max_bad_samples = max_bad_samples
        self.name = name
        self._skipped: dict[str, str] = {}
        self._reported: set[str] = set()

    def add(self, batch: Batch) -> None:
        """Collect what a microbatch skipped."""
        self._skipped.update(batch["skipped"])

    def report(self, logger: Logger) -> None:
        """Report over all ranks; raise RuntimeError on every rank after too many."""
        parts = dist.all_gather_object(self._skipped)
        found = {name: reason for part in parts for name, reason in part.items()}
        self._skipped = {}
        if not found:
            return
        logger.log_metrics({self.name: len(found)})
        if dist.get_global_rank() == 0:
            for name in sorted(found.keys() - self._reported):
                log.warning("evaluation skipped a sample: %s", found[name])
            log.warning("the scores leave out %d samples of %s that could not be used", len(found), self.where)
        self._reported |= found.keys()
        if len(found) > self.max_bad_samples:
            raise RuntimeError(
                f"{len(found)} evaluation samples could not be used, above eval_loader.max_bad_samples "
                f"{self.max_bad_samples}: fix the data set of {self.where}, or raise eval_loader.max_bad_samples"
            )


class EvaluationData(Callback):
    """Logs `data/eval_skipped_samples` of each evaluation, and each skipped sample once, with the reason.

    `max_bad_samples` is as in `SkippedSamples`.
    """

    def __init__(self, max_bad_samples: int):
        self.skipped = SkippedSamples("eval_loader", max_bad_samples, "data/eval_skipped_samples")

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        """Collect what the batch skipped."""
        for batch in state.batch if isinstance(state.batch, list) else [state.batch]:
            self.skipped.add(batch)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Report over all ranks."""
        self.skipped.report(logger)
