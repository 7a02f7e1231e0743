"""Read what the recipe itself needs of the section `trainer`, which holds keywords of Composer 0.32's Trainer.

Not a fix: Composer's names are kept here, so that a change of them is a change of this file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipe.config import RecipeConfig


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
