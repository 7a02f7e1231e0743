"""The model that Composer's Trainer sees: it joins the network, the losses and the metrics."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from recipe.config import EvaluationConfig, LossConfig, PromptConfig
from recipe.data.evaluation import answer_order
from recipe.losses.counts import UNIT_COUNTS, count_losses
from recipe.losses.proposals import proposal_losses
from recipe.losses.terms import base_term, caption_loss, denoising_losses, detection_losses, language_losses
from recipe.metrics.boxes import (
    answer_boxes,
    box_average_precision,
    category_average_precision,
    expression_accuracy,
    query_recall,
)
from recipe.metrics.calibration import calibration
from recipe.metrics.captions import caption_match, captions_read, dense_captioning
from recipe.metrics.gather import Evaluation
from recipe.metrics.scorers import TextScorer, default_text_scorer
from recipe.models.network import JointNetwork, Sealed
from recipe.prediction.classes import ClassTrie
from recipe.prediction.decode import Decoding, evaluated, predict
from recipe.schema import (
    Batch,
    CountedBatch,
    DetectedObject,
    EvalOutputs,
    JointOutputs,
    LossCounts,
    Prediction,
    Sample,
)


class EvaluationScope:
    """What the evaluation under way computes, everything if nobody sets it, and how long its parts take on this rank.

    Attributes:
        last_answered: Greatest `answer_order` of a sample that gets a text answer, if any does; None: all get one.
        with_categories: Whether there are scores by category, which read the captions of all objects.
        drawn: Ids of samples of this batch that are drawn, with the captions of objects from the score threshold on.
        seconds: Of each part.
    """

    def __init__(self) -> None:
        self.last_answered: int | None = None
        self.with_categories = True
        self.drawn: Collection[str] = ()
        self.start()

    def start(self) -> None:
        """Start the clock of an evaluation."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._since = perf_counter()

    def lap(self, part: str) -> None:
        """Add the time since the last call, or `start`, to a part. Waits for the GPU: not for steps of training."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = perf_counter()
        self.seconds[part] += now - self._since
        self._since = now


class JointModel(ComposerModel):
    """Losses, metrics and predictions of a `JointNetwork`."""

    def __init__(
        self,
        network: JointNetwork,
        tokenizer: PreTrainedTokenizerBase,
        loss: LossConfig,
        evaluation: EvaluationConfig,
        prompt: PromptConfig,
        classes: ClassTrie | None = None,
    ):
        super().__init__()
        self.model = network
        self.tokenizer = tokenizer
        self.loss_config = loss
        self.evaluation = evaluation
        self.prompt = prompt
        self.classes = classes
        self.scope = EvaluationScope()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the classes of which an evaluation gives each object a probability; none: it writes captions."""
        return () if self.classes is None else self.classes.names

    def forward(self, batch: Batch) -> JointOutputs:
        """Return the outputs of one microbatch."""
        return self.model(Sealed(batch))

    def loss(  # pyright: ignore[reportIncompatibleMethodOverride] - Composer's Trainer takes a dict too
        self, outputs: JointOutputs, batch: Batch | CountedBatch, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the named terms and their weighted `total`; a batch without counts counts as a whole global batch.

        A term of the language model is left out if the global batch has no token for it.

        Composer averages over all microbatches of all ranks. Each term is multiplied by their number, so that it logs
        and differentiates the global batch's sum divided by the global batch's count.
        """
        counts = batch["loss_counts"] if "loss_counts" in batch else count_losses(batch)
        terms = self.loss_terms(outputs, batch, counts)
        # The one weighted sum; repeated terms (earlier layers, groups, ...) have the weight of their base term.
        weighted = [getattr(self.loss_config, f"weight_{base_term(name)}") * term for name, term in terms.items()]
        terms["total"] = torch.stack(weighted).sum()
        # Of no token in the whole global batch: a 0 would read as learned.
        for name, count in (("lm_teacher", counts["teacher_tokens"]), ("lm_student", counts["student_tokens"])):
            if not count:
                del terms[f"loss_{name}"]
        return {name: term * counts["microbatches"] for name, term in terms.items()}

    def loss_terms(self, outputs: JointOutputs, batch: Batch, counts: LossCounts) -> dict[str, Tensor]:
        """Return the unweighted terms, divided by `counts`, with the same names on every rank for any batch."""
        terms = language_losses(outputs.label_losses, batch["label_roles"], counts)
        if not self.model.has_head:
            return terms
        terms |= detection_losses(outputs.detection, outputs.matches, outputs.targets, counts, self.loss_config)
        if outputs.detection.proposals is not None:
            terms |= proposal_losses(outputs.detection.proposals, outputs.targets, counts)
        terms["loss_caption"] = caption_loss(
            outputs.caption_losses, outputs.caption_images, len(outputs.targets), counts
        )
        if self.model.training and self.model.num_denoising_groups:
            terms |= denoising_losses(outputs.denoising, outputs.detection, counts, self.loss_config)
        return terms

    def eval_forward(self, batch: Batch, outputs: JointOutputs | None = None) -> EvalOutputs:
        """Return loss sums and predictions of one evaluation batch; ignore `outputs`, as captions need a new pass."""
        # Average precision scores the captions of all objects; metrics that need a threshold apply it themselves.
        evaluation = replace(self.evaluation, score_threshold=0.0)
        decoding = Decoding(
            self.tokenizer,
            evaluation,
            self.prompt,
            self.classes,
            is_answered=None if self.scope.last_answered is None else self._is_answered,
            described=None if self.scope.with_categories else self._described,
            lap=self.scope.lap,
        )
        made, predictions = predict(self.model, batch, decoding)
        samples = [sample for sample, _, _ in evaluated(batch)]
        scored = EvalOutputs(samples, predictions, self.loss_terms(made, batch, UNIT_COUNTS), count_losses(batch))
        self.scope.lap("forward")
        return scored

    def _is_answered(self, sample: Sample) -> bool:
        assert self.scope.last_answered is not None
        return answer_order(sample) <= self.scope.last_answered

    def _described(self, objects: Sequence[DetectedObject], sample: Sample) -> set[int]:
        """Return the objects whose captions a score, or the drawing of the sample, reads."""
        threshold = self.evaluation.score_threshold
        read = captions_read(objects, sample, threshold)
        if sample.id in self.scope.drawn:
            read |= {place for place, item in enumerate(objects) if item.score >= threshold}
        return read

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Return the metrics of `eval`, each a scalar under its own name."""
        if is_train:
            return {}
        scores = partial(
            all_scores,
            num_queries=self.model.detection_head.num_queries if self.model.has_head else None,
            score_threshold=self.evaluation.score_threshold,
            scorer=default_text_scorer(),
            with_answers=self.evaluation.answers is not None,
        )
        if not self.model.has_head:
            return Evaluation(scores, with_head=False).entries()
        return Evaluation(scores, category_average_precision).entries()

    def update_metric(self, batch: Batch, outputs: EvalOutputs, metric: Metric) -> None:
        """Add one evaluation batch to a metric."""
        metric.update(outputs.predictions, outputs.samples, outputs.loss_sums, outputs.counts)


def all_scores(
    predictions: Sequence[Prediction],
    samples: Sequence[Sample],
    num_queries: int | None,
    score_threshold: float,
    scorer: TextScorer,
    with_answers: bool,
) -> dict[str, float]:
    """Return every score of an evaluation but losses and those by category; `num_queries` is None without a head."""
    answers = answer_boxes(predictions, samples) if with_answers else {}
    if num_queries is None:
        return answers
    return {
        **box_average_precision(predictions, samples),
        **dense_captioning(predictions, samples, scorer),
        **caption_match(predictions, samples, score_threshold, scorer),
        **query_recall(predictions, samples, num_queries),
        **expression_accuracy(predictions, samples),
        **calibration(predictions, samples),
        **answers,
    }
