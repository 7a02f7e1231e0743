"""Read what the recipe itself needs of the section `trainer`, which holds keywords of Composer 0.32's Trainer.

Not a fix: Composer's names are kept here, so that a change of them is a change of this file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipe.config import ConfigError, RecipeConfig


@dataclass(frozen=True)
class TrainerView:
    """What the recipe itself reads of the section `trainer`."""

    keywords: Mapping[str, Any]  # the section without `parallelism_config`, for composer.Trainer
    max_duration: str | int | None  # such as 10ep; a number counts epochs
    precision: str | None  # None: Composer's default for the device
    device: str | None  # such as cpu or gpu; None: a GPU if there is one
    microbatch_size: int | None  # packs of one forward pass on one device; None: the whole device batch
    fsdp: Mapping[str, Any] | None  # FSDP's keywords; None: DDP
    save_folder: str | None  # of the checkpoints; None: none are saved
    save_overwrite: bool  # whether checkpoints of another run there may be replaced
    load_weights_only: bool  # whether only weights are read from `load_path`
    progress_bar: bool
    dist_timeout: float | None  # seconds that ranks wait for each other; None: the recipe's default

    @property
    def is_sharded(self) -> bool:
        """Return whether parameters are sharded over ranks."""
        return self.fsdp is not None

    @property
    def saves_shards(self) -> bool:
        """Return whether each rank writes its own part of a checkpoint."""
        return (self.fsdp or {}).get("state_dict_type") == "sharded"


def shards_and_replicas(fsdp: Mapping[str, Any] | None, world_size: int) -> tuple[int, int]:
    """Return over how many ranks FSDP shards the weights, and how many such groups there are; (1, ranks) for DDP.

    The ranks of a group follow one another, so with as many shards as a node has GPUs a node is a group.

    Raises:
        ConfigError: `data_parallel_shard_degree` and `data_parallel_replicate_degree` do not fit the ranks.
    """
    if fsdp is None:
        return 1, world_size
    where, names = "trainer.parallelism_config.fsdp", ("data_parallel_shard_degree", "data_parallel_replicate_degree")
    degrees = [fsdp.get(name, default) for name, default in zip(names, (-1, 1), strict=True)]
    degrees[1] = 1 if degrees[1] is None else degrees[1]  # Composer's default
    for name, degree in zip(names, degrees, strict=True):
        if not isinstance(degree, int) or isinstance(degree, bool) or (degree < 1 and degree != -1):
            raise ConfigError(f"{where}.{name} is {degree!r}: give a whole number above 0, or -1 for what is left")
    shards, replicas = degrees
    if shards == replicas == -1:
        raise ConfigError(f"{where}: both {names[0]} and {names[1]} are -1, what is left: give one of them")
    product = abs(shards * replicas)  # without that of which is left
    if world_size % product or (-1 not in degrees and world_size != product):
        raise ConfigError(
            f"{where}: {names[0]} {shards} times {names[1]} {replicas} is not the number of ranks, {world_size}: set "
            f"one of them to -1, which takes what is left, and the other to a divisor of {world_size}"
        )
    shards, replicas = (world_size // product if degree == -1 else degree for degree in degrees)
    if shards == 1 < replicas:
        raise ConfigError(
            f"{where}: {replicas} replicas on {world_size} ranks leave nothing to shard: set a smaller "
            f"{names[1]}, or trainer.parallelism_config=null for DDP"
        )
    return shards, replicas


def view_trainer(config: RecipeConfig) -> TrainerView:
    """Return what the recipe reads of the section `trainer`, whose keys only this function names."""
    section = config.trainer
    parallelism: dict[str, Any] = section.get("parallelism_config") or {}
    return TrainerView(
        keywords={name: value for name, value in section.items() if name != "parallelism_config"},
        max_duration=section.get("max_duration"),
        precision=section.get("precision"),
        device=section.get("device"),
        microbatch_size=section.get("device_train_microbatch_size"),
        fsdp=parallelism.get("fsdp"),
        save_folder=section.get("save_folder", f"{config.run_folder}/checkpoints"),
        save_overwrite=section.get("save_overwrite", False),
        load_weights_only=section.get("load_weights_only", False),
        progress_bar=section.get("progress_bar", True),
        dist_timeout=section.get("dist_timeout"),
    )
