"""Composer 0.32's state of training, where its own way of saving or restoring it falls short.

- A resume in mid-epoch loses the random states (seen with dropout): Composer restores them only if it skips the epoch's
  first batches itself, and Streaming's data sets do that.
- The parts of a weights-only checkpoint are private methods of `State`.

Delete once Composer restores random states before `fit`, and has a public weights-only state.
"""

from typing import Any

from composer import State, Trainer
from composer.utils import reproducibility


def restore_random_states(trainer: Trainer) -> None:
    """Restore every rank's random states to those after the batch that a run resumed from; before `fit`."""
    if trainer._rng_state is not None:
        reproducibility.load_rng_state(trainer._rng_state)


def weights_only_state(state: State) -> dict[str, Any]:
    """Return what Composer saves with `save_weights_only`."""
    return {
        "model": state.get_model_state_dict(),
        "integrations": state._get_integrations_state_dict(),
        "metadata": state._get_state_metadata(),
    }
