"""What each loss term does to the training: its share of the total, and its gradient on what all terms share."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, replace

import torch
from composer import Callback
from composer.core import State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from recipe.algorithms.norms import is_sharded, local, named_groups
from recipe.callbacks.group_metrics import every_batches
from recipe.config import GROUPS, LossConfig
from recipe.joint import JointModel
from recipe.losses.counts import split_batch
from recipe.losses.detection import REPEATS

log = logging.getLogger(__name__)

WEIGHT = "weight_"
LANGUAGE = ("lm_teacher", "lm_student")


def joint_model(state: State) -> JointModel:
    """The model under DDP's wrapper, if there is one."""
    model = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
    assert isinstance(model, JointModel)
    return model


def term_weights(config: LossConfig) -> dict[str, float]:
    """The weight of every term: {"lm_teacher": 0.3, ...}."""
    return {name.removeprefix(WEIGHT): value for name, value in asdict(config).items() if name.startswith(WEIGHT)}


class LossShares(Callback):
    """Logs `loss/share/{term}`: the weighted term over the total, its repeats after earlier layers and of denoising in.

    The terms themselves, not weighted, Composer logs as `loss/train/*`: `lm_teacher` and `lm_student` among them.
    """

    def batch_end(self, state: State, logger: Logger) -> None:
        """From the terms that Composer has averaged over ranks: plain numbers."""
        losses = state.total_loss_dict or {}
        total = float(losses.get("loss/train/total", 0.0))
        if not total:
            return
        weights = term_weights(joint_model(state).loss_config)
        logger.log_metrics(
            {
                f"loss/share/{term}": weight
                * sum(float(losses.get(f"loss/train/loss_{term}{repeat}", 0.0)) for repeat in ("", *REPEATS))
                / total
                for term, weight in weights.items()
            }
        )


class LossGradients(Callback):
    """Are detection and language fighting? Gradients of each weighted loss term on what both learn through.

    Logged every `interval`: `loss_gradient/{term}`, the norm of the term's gradient on the shared parameters, and
    `loss_gradient/cosine` of the sum of the language terms with the sum of the others: below 0 they pull apart.

    Measured on the first microbatch of every rank, averaged over ranks; the norms are on the scale of the whole batch,
    if microbatches are alike. Each term takes a forward and a backward pass of that microbatch, so at 6 terms and 8
    microbatches a step a measurement costs three quarters of one: choose a long interval. Training does not notice: no
    random number, gradient, weight or moment is other than without it.

    Args:
        interval: Number of batches, such as `500ba`.
        group: The shared parameter group. Every vision feature that the language model or the head reads has passed
            through the merger.
    """

    def __init__(self, interval: str = "500ba", group: str = "merger"):
        self.num_batches = every_batches(interval)
        if group not in GROUPS:
            raise ValueError(f"loss_gradients.group is {group!r}: it must be one of {', '.join(GROUPS)}")
        self.group = group
        self.told = False

    def batch_start(self, state: State, logger: Logger) -> None:
        """Measures before the step: all ranks together, each backward pass being averaged over them."""
        if (int(state.timestamp.batch) + 1) % self.num_batches:
            return
        parameters = [p for p in named_groups(state.optimizers[0]).get(self.group, []) if p.requires_grad]
        if not parameters:
            if not self.told:
                log.warning("loss_gradients: the group %s is frozen, so nothing is measured", self.group)
            self.told = True
            return
        weights = term_weights(joint_model(state).loss_config)
        sums = {True: [torch.zeros_like(local(p)) for p in parameters]}
        sums[False] = [torch.zeros_like(part) for part in sums[True]]
        squares: list[Tensor] = []
        terms = [term for term, weight in weights.items() if weight]
        for gradient, term in zip(self._gradients(state, parameters, terms), terms, strict=True):
            squares.append(_dot(gradient, gradient))
            for total, part in zip(sums[term in LANGUAGE], gradient, strict=True):
                total += part
        language, others = sums[True], sums[False]
        numbers = torch.stack([*squares, _dot(language, others), _dot(language, language), _dot(others, others)])
        if is_sharded(state):
            dist.all_reduce(numbers)
        *term_squares, product, language_square, other_square = numbers.tolist()
        metrics = {f"loss_gradient/{term}": square**0.5 for term, square in zip(terms, term_squares, strict=True)}
        if language_square and other_square:
            metrics["loss_gradient/cosine"] = product / (language_square * other_square) ** 0.5
        logger.log_metrics(metrics)

    def _gradients(
        self, state: State, parameters: list[torch.nn.Parameter], terms: list[str]
    ) -> Iterator[list[Tensor]]:
        """This rank's part of the gradient of each term alone, one after another; leaves no trace."""
        model = joint_model(state)
        microbatch = split_batch(deepcopy(state.batch), float("inf"))[0]
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        for term in terms:
            with torch.random.fork_rng(devices), only_term(model, term):
                batch = state.device.batch_to_device(deepcopy(microbatch))
                with get_precision_context(state.precision, state.precision_config):
                    # Not the network alone: the wrapper of DDP or FSDP averages the gradients.
                    loss = model.loss(state.model(batch), batch)["total"]
                loss.backward()
            yield [torch.zeros_like(local(p)) if p.grad is None else local(p.grad).clone() for p in parameters]
            for parameter in state.model.parameters():
                parameter.grad = None


@contextmanager
def only_term(model: JointModel, term: str) -> Iterator[None]:
    """All other weights are 0; the other terms still take part in the backward pass, so no rank waits for another."""
    config = model.loss_config
    zeros = {WEIGHT + other: 0.0 for other in term_weights(config) if other != term}
    model.loss_config = replace(config, **zeros)
    try:
        yield
    finally:
        model.loss_config = config


def _dot(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """The scalar product over all tensors, () float64; added up by torch in at least float32."""
    parts = [torch.dot(a.flatten().to(b.dtype), b.flatten()).double() for a, b in zip(left, right, strict=True)]
    return torch.stack(parts).sum()
