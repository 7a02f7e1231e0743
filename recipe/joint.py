"""The model that Composer's Trainer sees: where the network, the losses and the metrics meet."""

from dataclasses import replace
from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from recipe.config import EvaluationConfig, LossConfig, PromptConfig
from recipe.losses.counts import UNIT_COUNTS, count_losses
from recipe.losses.detection import base_term, caption_loss, denoising_losses, detection_losses
from recipe.losses.language import language_losses
from recipe.metrics.answers import AnswerBoxes
from recipe.metrics.boxes import BoxAveragePrecision, CategoryAveragePrecision, ExpressionAccuracy, QueryRecall
from recipe.metrics.calibration import Calibration
from recipe.metrics.captions import CaptionCider, CaptionMatch, DenseCaptioningMAP
from recipe.metrics.gather import LossAverage, MetricEntry, metric_entries
from recipe.metrics.scorers import default_text_scorer
from recipe.models.network import JointNetwork
from recipe.models.sharding import Sealed
from recipe.prediction.decode import Decoding, predict
from recipe.schema import Batch, CountedBatch, EvalOutputs, JointOutputs, LossCounts


class JointModel(ComposerModel):
    """Losses, metrics and predictions of a `JointNetwork`.

    Args:
        network: The one child module.
        tokenizer: Decodes captions and answers.
        loss: Weights of the terms.
        evaluation: How predictions are made.
        prompt: Holds the frame in which an answer counts its boxes.
    """

    def __init__(
        self,
        network: JointNetwork,
        tokenizer: PreTrainedTokenizerBase,
        loss: LossConfig,
        evaluation: EvaluationConfig,
        prompt: PromptConfig,
    ):
        super().__init__()
        self.model = network
        self.tokenizer = tokenizer
        self.loss_config = loss
        self.evaluation = evaluation
        self.prompt = prompt

    def forward(self, batch: Batch) -> JointOutputs:
        """Return the outputs of one microbatch."""
        return self.model(Sealed(batch))

    def loss(  # pyright: ignore[reportIncompatibleMethodOverride] - Composer's Trainer takes a dict too
        self, outputs: JointOutputs, batch: Batch | CountedBatch, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the named terms and their weighted `total`; a batch without counts is taken for a whole global batch.

        Composer averages over all microbatches of all ranks. Each term is multiplied by their number, so what it logs
        and differentiates is the global batch's sum over the global batch's count.
        """
        counts = batch["loss_counts"] if "loss_counts" in batch else count_losses(batch)
        terms = self.loss_terms(outputs, batch, counts)
        # The one weighted sum; terms of earlier layers and the like weigh as the term they repeat.
        weighted = [getattr(self.loss_config, f"weight_{base_term(name)}") * term for name, term in terms.items()]
        terms["total"] = torch.stack(weighted).sum()
        return {name: term * counts["microbatches"] for name, term in terms.items()}

    def loss_terms(self, outputs: JointOutputs, batch: Batch, counts: LossCounts) -> dict[str, Tensor]:
        """Return the unweighted terms, divided by `counts`: the same names on every rank, whatever its batch holds."""
        terms = language_losses(outputs.label_logits, batch["labels"], batch["label_roles"], counts)
        terms |= detection_losses(outputs.detection, outputs.matches, outputs.targets, counts, self.loss_config)
        terms["loss_caption"] = caption_loss(
            outputs.caption_logits, outputs.caption_labels, outputs.caption_images, len(outputs.targets), counts
        )
        if self.model.training and self.model.num_denoising_groups:
            terms |= denoising_losses(outputs.denoising, outputs.detection, counts, self.loss_config)
        return terms

    def eval_forward(self, batch: Batch, outputs: JointOutputs | None = None) -> EvalOutputs:
        """Return loss sums and predictions of one evaluation batch; ignores `outputs`, as captions need a new pass."""
        # Average precision judges the captions of all objects; metrics that need a threshold apply it themselves.
        evaluation = replace(self.evaluation, score_threshold=0.0)
        made, predictions = predict(self.model, batch, Decoding(self.tokenizer, evaluation, self.prompt))
        return EvalOutputs(predictions, self.loss_terms(made, batch, UNIT_COUNTS), count_losses(batch))

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Return the metrics of `eval`, each a scalar under its own name."""
        if is_train:
            return {}
        threshold, scorer = self.evaluation.score_threshold, default_text_scorer()
        boxes, categories, captions = BoxAveragePrecision(), CategoryAveragePrecision(), CaptionMatch(threshold, scorer)
        dense_captions = DenseCaptioningMAP(scorer)
        sources: dict[Metric, tuple[str, ...]] = {
            boxes: boxes.names,
            categories: categories.names,
            dense_captions: dense_captions.names,
            captions: captions.names,
            CaptionCider(threshold): ("caption_cider_d",),
            QueryRecall(self.model.detection_head.num_queries): ("recall_ceiling", "query_recall50"),
            ExpressionAccuracy(): ("refcoco_acc", "refcoco_samples"),
            Calibration(): ("ece", "best_score_threshold", "best_f1"),
            LossAverage(): tuple(LossAverage.denominators),
        }
        if self.evaluation.generate_answer:
            sources[AnswerBoxes()] = ("text_f1", "text_f1_95", "text_miou", "text_parse_failure_rate")
        return {name: entry for source, names in sources.items() for name, entry in metric_entries(source, names)}

    def update_metric(self, batch: Batch, outputs: EvalOutputs, metric: Metric) -> None:
        """Add one evaluation batch to a metric."""
        assert isinstance(metric, MetricEntry)
        if isinstance(metric.source, LossAverage):
            metric.update(outputs.loss_sums, outputs.counts)
        else:
            metric.update(outputs.predictions, batch["samples"])
