"""Log what each loss term contributes: its share of the total, and its gradient on the shared parameters."""

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

from recipe.callbacks.group_metrics import every_batches
from recipe.config import GROUPS, LossConfig
from recipe.joint import JointModel
from recipe.losses.counts import split_batch
from recipe.losses.detection import REPEATS
from recipe.optim.groups import local, named_groups

log = logging.getLogger(__name__)

WEIGHT = "weight_"
LANGUAGE = ("lm_teacher", "lm_student")


def joint_model(state: State) -> JointModel:
    """Return the model without DDP's wrapper."""
    model = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
    assert isinstance(model, JointModel)
    return model


def term_weights(config: LossConfig) -> dict[str, float]:
    """Return the weight of every term: {"lm_teacher": 0.3, ...}."""
    return {name.removeprefix(WEIGHT): value for name, value in asdict(config).items() if name.startswith(WEIGHT)}


class LossShares(Callback):
    """Logs `loss/share/{term}`: the weighted term, repeats (earlier layers, denoising) included, over the total.

    Composer logs the unweighted terms as `loss/train/*`.
    """

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the shares of the terms that Composer has averaged over ranks."""
        losses = state.total_loss_dict or {}
        total = float(losses.get("loss/train/total", 0.0))
        if not total:
            return
        weights = term_weights(joint_model(state).loss_config)
        metrics = {}
        for term, weight in weights.items():
            values = [float(losses.get(f"loss/train/loss_{term}{repeat}", 0.0)) for repeat in ("", *REPEATS)]
            metrics[f"loss/share/{term}"] = weight * sum(values) / total
        logger.log_metrics(metrics)


class LossGradients(Callback):
    """Measures whether detection and language pull the shared parameters in different directions.

    Logs, every `interval`, `loss_gradient/{term}`: the norm of the weighted term's gradient on the shared parameters.
    Also logs `loss_gradient/cosine` of the summed language terms with the sum of the others: below 0 they pull apart.

    Measured on the first microbatch of every rank and averaged over ranks; if microbatches are alike, the norms are on
    the scale of the whole batch. Each term takes a forward and a backward pass of that microbatch: with 6 terms and 8
    microbatches per step, a measurement costs three quarters of a step. Choose a long interval. Training is unchanged:
    every random number, gradient, weight and moment is as without it.

    Args:
        interval: Batches between two measurements, such as `500ba`.
        group: The shared parameter group. All that language model and head read of an image passes through the merger.
    """

    def __init__(self, interval: str = "500ba", group: str = "merger"):
        self.num_batches = every_batches(interval)
        if group not in GROUPS:
            raise ValueError(f"loss_gradients.group is {group!r}: it must be one of {', '.join(GROUPS)}")
        self.group = group
        self.has_warned = False

    def batch_start(self, state: State, logger: Logger) -> None:
        """Measure before the step, on all ranks together: each backward pass is averaged over them."""
        if (int(state.timestamp.batch) + 1) % self.num_batches:
            return
        parameters = [p for p in named_groups(state.optimizers[0]).get(self.group, []) if p.requires_grad]
        if not parameters:
            if not self.has_warned:
                log.warning("loss_gradients: the group %s is frozen, so nothing is measured", self.group)
            self.has_warned = True
            return
        weights = term_weights(joint_model(state).loss_config)
        language, others = ([torch.zeros_like(local(p)) for p in parameters] for _ in range(2))
        squares: list[Tensor] = []
        terms = [term for term, weight in weights.items() if weight]
        for gradient, term in zip(self._gradients(state, parameters, terms), terms, strict=True):
            squares.append(_dot(gradient, gradient))
            for total, part in zip(language if term in LANGUAGE else others, gradient, strict=True):
                total += part
        numbers = torch.stack([*squares, _dot(language, others), _dot(language, language), _dot(others, others)])
        if state.fsdp_enabled:
            dist.all_reduce(numbers)
        *term_squares, product, language_square, other_square = numbers.tolist()
        metrics = {f"loss_gradient/{term}": square**0.5 for term, square in zip(terms, term_squares, strict=True)}
        if language_square and other_square:
            metrics["loss_gradient/cosine"] = product / (language_square * other_square) ** 0.5
        logger.log_metrics(metrics)

    def _gradients(
        self, state: State, parameters: list[torch.nn.Parameter], terms: list[str]
    ) -> Iterator[list[Tensor]]:
        """Yield this rank's part of the gradient of each term alone; leaves no trace."""
        model = joint_model(state)
        microbatch = split_batch(deepcopy(state.batch), float("inf"))[0]
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        for term in terms:
            with torch.random.fork_rng(devices), only_term(model, term):
                batch = state.device.batch_to_device(deepcopy(microbatch))
                with get_precision_context(state.precision, state.precision_config):
                    # Through the wrapper of DDP or FSDP, which averages the gradients.
                    loss = model.loss(state.model(batch), batch)["total"]
                loss.backward()
            yield [torch.zeros_like(local(p)) if p.grad is None else local(p.grad).clone() for p in parameters]
            for parameter in state.model.parameters():
                parameter.grad = None


@contextmanager
def only_term(model: JointModel, term: str) -> Iterator[None]:
    """Set all other weights to 0; those terms still take part in the backward pass, so no rank waits for another."""
    config = model.loss_config
    zeros = {WEIGHT + other: 0.0 for other in term_weights(config) if other != term}
    model.loss_config = replace(config, **zeros)
    try:
        yield
    finally:
        model.loss_config = config


def _dot(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Return the scalar product over all tensors, () float64; torch adds up in float32 or wider."""
    parts = [torch.dot(a.flatten().to(b.dtype), b.flatten()).double() for a, b in zip(left, right, strict=True)]
    return torch.stack(parts).sum()
