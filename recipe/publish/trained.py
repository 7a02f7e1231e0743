"""Show that a folder holds all that a run has trained: a hash per tensor, compared with what is read back."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from recipe.checkpoints.base import NETWORK, frozen_groups
from recipe.checkpoints.weights import answering_weights, is_sharded, read_weights, some
from recipe.config import RecipeConfig
from recipe.models.lora import adapters
from recipe.models.network import JointNetwork
from recipe.optim.groups import group_of

TRAINED_FILE = "trained_tensors.json"
_ABOUT = (
    "SHA-256 of dtype, shape and bytes of each tensor that the run trained, by its name in the checkpoint. Each was "
    "found in a .safetensors file of this folder. Where adapters are merged, the tensor is the sum of base and adapter."
)


def trained_hashes(checkpoint: str | Path, network: JointNetwork, config: RecipeConfig) -> dict[str, str]:
    """Return the hash of each tensor that a run trained, by its name in the network, as the checkpoint holds it.

    Of an averaged weight it is the average's. A checkpoint in a store is not fetched again: its tensors are those of
    the network, which was filled from it.
    """
    path, frozen = Path(checkpoint), frozen_groups(config)
    if path.is_file() or is_sharded(path):
        weights = answering_weights(read_weights(path), NETWORK)
        weights = {name.removeprefix(NETWORK): value for name, value in weights.items() if name.startswith(NETWORK)}
    else:
        weights = answering_weights(network.state_dict())
    dtypes = {name: value.dtype for name, value in network.state_dict().items()}
    return {
        name: tensor_hash(value.to(dtypes.get(name, value.dtype)))
        for name, value in weights.items()
        if not (name.startswith("vlm.") and group_of(name) in frozen)
    }


def merged_layers(network: JointNetwork) -> set[str]:
    """Return the names of the layers that have adapters, as they are once these are merged."""
    return {name.partition(".lora_")[0] for name in adapters(network)}


def with_merged(hashes: Mapping[str, str], network: JointNetwork, layers: set[str]) -> dict[str, str]:
    """Return the hashes with those of the merged layers' weights in place of the adapters'; call it after merging."""
    kept = {name: value for name, value in hashes.items() if ".lora_" not in name}
    sums = {f"{name}.weight": network.get_submodule(name) for name in sorted(layers)}
    for name, layer in sums.items():
        assert isinstance(layer, nn.Linear), f"{name} is not merged"
        kept[name] = tensor_hash(layer.weight)
    return kept


def tensor_hash(value: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes."""
    found = hashlib.sha256(f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}\n".encode())
    found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)  # bfloat16 too
    return found.hexdigest()


def check_trained(folder: Path, hashes: Mapping[str, str]) -> None:
    """Raise ValueError if the folder lacks a trained tensor; else write the list of hashes to it.

    The folder's files are read back, so what was not written, or in another precision, is found.
    """
    there = {tensor_hash(value) for value in _tensors(folder)}
    lacking = [name for name, value in hashes.items() if value not in there]
    if lacking:
        raise ValueError(
            f"the export lacks {len(lacking)} of {len(hashes)} tensors that the run trained ({some(lacking)}): nothing "
            "is written; give the configuration of the run, and report this if it was"
        )
    text = json.dumps({"about": _ABOUT, "tensors": dict(sorted(hashes.items()))}, indent=1)
    (folder / TRAINED_FILE).write_text(text + "\n", encoding="utf-8")


def _tensors(folder: Path) -> Iterator[Tensor]:
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (no dict)
                yield file.get_tensor(name)
