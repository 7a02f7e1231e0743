"""Report and bound the samples that an evaluation skips."""

import logging

from composer import Callback
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

log = logging.getLogger(__name__)


class EvaluationData(Callback):
    """Logs `data/eval_skipped_samples` of each evaluation, and each skipped sample once, with the reason.

    Args:
        max_bad_samples: One more skipped sample in an evaluation, over all ranks, stops the run.
    """

    def __init__(self, max_bad_samples: int):
        self.max_bad_samples = max_bad_samples
        self._skipped: dict[str, str] = {}
        self._reported: set[str] = set()

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        """Collect what the batch skipped."""
        for batch in state.batch if isinstance(state.batch, list) else [state.batch]:
            self._skipped.update(batch["skipped"])

    def eval_end(self, state: State, logger: Logger) -> None:
        """Report over all ranks; raise RuntimeError on every rank after too many."""
        parts = dist.all_gather_object(self._skipped)
        found = {name: reason for part in parts for name, reason in part.items()}
        self._skipped = {}
        if not found:
            return
        logger.log_metrics({"data/eval_skipped_samples": len(found)})
        if dist.get_global_rank() == 0:
            for name in sorted(found.keys() - self._reported):
                log.warning("evaluation skipped a sample: %s", found[name])
            log.warning("the scores leave out %d samples that could not be used", len(found))
        self._reported |= found.keys()
        if len(found) > self.max_bad_samples:
            raise RuntimeError(
                f"{len(found)} evaluation samples could not be used, above eval_loader.max_bad_samples "
                f"{self.max_bad_samples}: fix the data set, or raise eval_loader.max_bad_samples"
            )
