"""What Composer 0.32 saves and restores, as far as its own way is not enough.

- A mid-epoch resume loses the random states (seen with dropout). `Trainer._train_loop` restores them only if it skips
  the epoch's first batches itself, but Streaming's data sets skip them.
- The parts of a weights-only checkpoint are private methods of `State`.

Delete once Composer restores random states before `fit`, and has a public weights-only state.
"""

from typing import Any

from composer import State, Trainer
from composer.utils import reproducibility


def restore_random_states(trainer: Trainer) -> None:
    """Restore every rank's random states after a resume; call it before `fit`."""
    if trainer._rng_state is not None:
        reproducibility.load_rng_state(trainer._rng_state)


def weights_only_state(state: State) -> dict[str, Any]:
    """Return what Composer saves with `save_weights_only`."""
    return {
        "model": state.get_model_state_dict(),
        "integrations": state._get_integrations_state_dict(),
        "metadata": state._get_state_metadata(),
    }
