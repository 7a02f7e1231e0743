"""Compare the text path with the base model's at every evaluation."""

import torch
from composer import Callback, DataSpec
from composer.core import State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist

from recipe.callbacks.evaluation_data import SkippedSamples
from recipe.callbacks.measures import joint_model
from recipe.joint import EvaluationScope
from recipe.metrics.gather import UNDEFINED
from recipe.models.retention import divergence_from_base
from recipe.models.vlm import VisionLanguageModel

RETENTION_SCORES = ("retention_kl", "retention_loss", "retention_base_loss", "retention_tokens")


class Retention(Callback):
    """Adds the `RETENTION_SCORES` to those of each evaluation and logs them as `metrics/eval/*`.

    They are means over all answer tokens of all ranks: KL(base || model) over the whole vocabulary, the loss of the
    model and that of the base, in nats; and the number of tokens. Their sums are in float64, so that neither batches
    nor ranks show.

    Args:
        loader: Of `build_eval_loader`; every rank gets equally many batches.
        scope: Of the model, for the time it takes.
        max_bad_samples: One more skipped sample, over all ranks, stops the run.
        base: None: the model without its adapters.
    """

    def __init__(
        self, loader: DataSpec, scope: EvaluationScope, max_bad_samples: int, base: VisionLanguageModel | None = None
    ):
        self.loader = loader
        self.scope = scope
        self.skipped = SkippedSamples("evaluation.retention", max_bad_samples, "data/retention_skipped_samples")
        self.base = base

    def eval_end(self, state: State, logger: Logger) -> None:
        """Measure, after the metrics and before those that read them; one all-reduce."""
        self.scope.lap("scoring")
        network = joint_model(state).model
        if self.base is not None:
            self.base = state.device.module_to_device(self.base)
        sums = torch.zeros(4, dtype=torch.float64)
        for batches in self.loader.dataloader:
            for batch in batches:
                self.skipped.add(batch)
                batch = state.device.batch_to_device(batch)
                with get_precision_context(state.precision, state.precision_config):
                    found = divergence_from_base(network, batch, self.base)
                sums[:3] += found.sum(dim=1, dtype=torch.float64).cpu()
                sums[3] += found.shape[1]
        sums = state.device.tensor_to_device(sums)
        dist.all_reduce(sums)
        *totals, tokens = sums.tolist()
        means = [total / tokens if tokens else UNDEFINED for total in totals]
        scores: dict[str, float] = dict(zip(RETENTION_SCORES, (*means, tokens), strict=True))
        state.eval_metric_values.update(scores)
        logger.log_metrics({f"metrics/eval/{name}": value for name, value in scores.items()})
        self.skipped.report(logger)
        self.scope.lap("retention")
