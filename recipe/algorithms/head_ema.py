"""Keep an exponential moving average (EMA) of the head's weights, for evaluation, prediction and export."""

from typing import Any

import torch
from composer import Algorithm, Event, Logger, State
from composer.algorithms import EMA

from recipe.config import EmaConfig
from recipe.models.network import JointNetwork
from recipe.optim.groups import local
from recipe.upstream.torch_private import foreach_lerp_


class HeadEMA(Algorithm):
    """Apply Composer's EMA to memory, detection head and caption decoder only.

    Composer's `EMA` copies the whole model and swaps weights around evaluations and checkpoints. Here the average is
    `JointNetwork.average`, used in evaluation mode: a checkpoint always holds both weights and average, each by its
    own name. Skipped batches do not count as steps.
    """

    def __init__(self, config: EmaConfig):
        rule = EMA(config.half_life, config.smoothing, update_interval=config.update_interval)
        assert rule.smoothing is not None
        self.smoothing: float = rule.smoothing
        self.update_interval = int(rule.update_interval)
        self.num_steps = 0

    def match(self, event: Event, state: State) -> bool:
        """Match the end of a batch, before NaNRollback takes its snapshot."""
        return event is Event.BATCH_END

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Update the average after every `update_interval` optimizer steps."""
        if all(parameter.grad is None for parameter in state.model.parameters()):
            return  # NaNRollback skipped the batch
        self.num_steps += 1
        if self.num_steps % self.update_interval == 0:
            model: Any = state.model.module if state.is_model_ddp else state.model
            update(model.model, self.smoothing)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps; the average itself is among the model's weights."""
        return {**super().state_dict(), "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the number of steps."""
        self.num_steps = state["num_steps"]


@torch.no_grad()
def update(network: JointNetwork, smoothing: float) -> None:
    """Set every average to `smoothing * average + (1 - smoothing) * weight`, on this rank's shards."""
    pairs = network.averaged_parameters()
    weights = [local(weight) for weight, _ in pairs]
    averages = [local(average) for _, average in pairs]
    foreach_lerp_(averages, weights, 1.0 - smoothing)  # lerp: bit-equal if both are equal, as in a frozen head
