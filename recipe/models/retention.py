"""How far the text path has moved from the base model's: per answer token of a chat, by whole distributions.

Adapters are the only change that can be taken back: without them the network computes as its base does, at no memory.
If other weights of the trunk learn, the base has to be given.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from recipe.models.lora import without_adapters
from recipe.models.network import JointNetwork, Sealed, run_trunk
from recipe.models.token_losses import token_divergences
from recipe.models.vlm import VisionLanguageModel
from recipe.schema import Batch


@torch.no_grad()
def divergence_from_base(
    network: JointNetwork, batch: Batch, base: VisionLanguageModel | None = None
) -> Float[Tensor, "3 K"]:
    """Return KL(base || network), the network's loss and the base's, of each of the batch's K supervised tokens.

    All ranks must call it equally often if the network is sharded. `base` None: the network without its adapters.
    """
    # Inside the network's pass, as FSDP shards the output matrix outside of it.
    return network(Sealed(batch), instead=partial(_divergences, network.vlm, base))


def _divergences(vlm: VisionLanguageModel, base: VisionLanguageModel | None, batch: Batch) -> Tensor:
    states = _answer_states(vlm, batch)
    if base is None:
        with without_adapters(vlm.hf_model):
            base_states = _answer_states(vlm, batch)
    else:
        base_states = _answer_states(base, batch)
    weight, base_weight = (part.hf_model.lm_head.weight for part in (vlm, base or vlm))
    return token_divergences(states, weight, base_states, base_weight, batch["labels"])


def _answer_states(vlm: VisionLanguageModel, batch: Batch) -> Tensor:
    return run_trunk(vlm, batch).last_hidden_state[batch["label_index"]]
