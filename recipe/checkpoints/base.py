"""Leave the weights that a run never trains out of its checkpoints: they are those of the base model.

A checkpoint then holds a fingerprint of what it lacks. Whoever loads it takes the rest from the base model, and refuses
another base than the run's.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recipe.config import RecipeConfig
from recipe.models.network import JointNetwork
from recipe.models.nf4 import plain_shapes, plain_sums
from recipe.optim.groups import group_of
from recipe.upstream.trainer_section import view_trainer

FINGERPRINT = "base_fingerprint"  # a buffer of the joint model: (32,) uint8
NETWORK = "model."  # prefix of the network's names in the joint model, and so in a checkpoint
BACKBONE = ("vision", "merger", "llm")


def frozen_groups(config: RecipeConfig) -> frozenset[str]:
    """Return the parts of the language model that no stage of a run trains: those with a rate of 0."""
    return frozenset(group for group in BACKBONE if getattr(config.optimizer, f"lr_{group}") == 0)


def base_weights(network: JointNetwork, config: RecipeConfig) -> dict[str, Tensor]:
    """Return the weights that a run's checkpoints leave out, by their names there; tied ones under both.

    They are none under FSDP1, whose parameters are not the weights of the model.
    """
    if view_trainer(config).is_sharded and config.fsdp_version == 1:
        return {}
    groups = frozen_groups(config)
    weights = network.vlm.state_dict(prefix=f"{NETWORK}vlm.")
    return {name: weight for name, weight in weights.items() if group_of(name) in groups}


@torch.no_grad()
def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return a hash of names, shapes and values, the latter rounded to bfloat16, in which bases are published.

    Reads each weight once; of those in another precision it gives the same as of their bfloat16 values, and of those
    stored in nf4 the same as of the weights that they were.
    """
    shapes, sums = plain_shapes(weights), plain_sums(weights)
    entries = [(name.removeprefix(NETWORK), shapes[name], sums[name]) for name in sorted(sums)]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def leave_out(model: nn.Module, names: Collection[str], found: str) -> None:
    """Make a joint model's `state_dict` lack the named weights, and loading one that lacks them keep the model's own.

    Args:
        model: It is not sharded yet.
        names: From `base_weights`.
        found: Their fingerprint.
    """
    model.register_buffer(FINGERPRINT, torch.frombuffer(bytearray.fromhex(found), dtype=torch.uint8))
    left_out = frozenset(names)

    def remove(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        for name in left_out:
            state.pop(prefix + name, None)

    def restore(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if name in left_out:
                state.setdefault(prefix + name, parameter)

    model.register_state_dict_post_hook(remove)
    model.register_load_state_dict_pre_hook(restore)


def add_base(network: JointNetwork, weights: dict[str, Tensor], source: object) -> None:
    """Add to a checkpoint's weights those that it left out, which are the network's own; change the dict in place.

    Raises:
        ValueError: The network's base is another one than the checkpoint's run had.
    """
    expected = weights.pop(FINGERPRINT, None)
    if expected is None:
        return
    own = network.vlm.state_dict(prefix=f"{NETWORK}vlm.")
    # Of the backbone alone: a missing adapter is not the base's, and `fill` names it.
    lacking = {name: value for name, value in own.items() if name not in weights and group_of(name) in BACKBONE}
    if fingerprint(lacking) != bytes(expected.tolist()).hex():
        raise ValueError(
            f"{source} holds only what its run trained, on top of another base model: set "
            "model.pretrained_model_name_or_path to the one of that run"
        )
    weights.update(lacking)
