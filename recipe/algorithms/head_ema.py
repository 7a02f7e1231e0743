"""An exponential moving average of the head's weights, for evaluation and for all that answers with a checkpoint."""

from typing import Any

import torch
from composer import Algorithm, Event, Logger, State
from composer.algorithms import EMA

from recipe.algorithms.norms import local
from recipe.config import EmaConfig
from recipe.models.network import JointNetwork
from recipe.upstream.torch_private import foreach_lerp_


class HeadEMA(Algorithm):
    """Composer's EMA, of memory, detection head and caption decoder alone.

    The smoothing is Composer's; its copy of the whole model is not: of 3 billion parameters only the head's are wanted.
    Nor is its swap of weights at evaluations and checkpoints, of which not all happen where it looks: the average is
    `JointNetwork.average`, which evaluation mode computes with, so that at any time a checkpoint, a snapshot or a
    rollback holds the trained weights and their average, each under names of their own.

    A step is an update every `update_interval`; a batch that was skipped is no step. Each rank moves its own shards, by
    `lerp`, which keeps every bit where average and weight are equal, as in a head that is frozen from the start.

    Attributes:
        num_steps: Made by the optimizer so far.

    Args:
        config: How fast the average follows.
    """

    def __init__(self, config: EmaConfig):
        rule = EMA(config.half_life, config.smoothing, update_interval=config.update_interval)
        assert rule.smoothing is not None
        self.smoothing: float = rule.smoothing
        self.update_interval = int(rule.update_interval)
        self.num_steps = 0

    def match(self, event: Event, state: State) -> bool:
        """Whether there is something to do: before the guard takes its snapshot of the batch's end."""
        return event is Event.BATCH_END

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """See the class."""
        if all(parameter.grad is None for parameter in state.model.parameters()):
            return  # the guard has taken them away
        self.num_steps += 1
        if self.num_steps % self.update_interval == 0:
            update(network_of(state), self.smoothing)

    def state_dict(self) -> dict[str, Any]:
        """The average itself is among the model's weights."""
        return {**super().state_dict(), "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the saved run was."""
        self.num_steps = state["num_steps"]


def network_of(state: State) -> JointNetwork:
    """The network that has the averages, which FSDP1 may have wrapped."""
    model: Any = state.model.module if state.is_model_ddp else state.model
    return model.model


@torch.no_grad()
def update(network: JointNetwork, smoothing: float) -> None:
    """Makes of every average `smoothing * average + (1 - smoothing) * weight`; of this rank's shards."""
    pairs = network.averaged_parameters()
    weights = [local(weight) for weight, _ in pairs]
    averages = [local(average) for _, average in pairs]
    foreach_lerp_(averages, weights, 1.0 - smoothing)
