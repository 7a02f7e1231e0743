"""FSDP2 on a mesh of two dimensions: shards within a group of ranks, replicas across the groups.

Fault of Composer 0.32 (`composer/core/state.py`, `State.__init__`): it replaces `FSDP2Config.device_mesh` by a mesh
that it makes from the config's degrees. `FSDP2Config` has these as read-only properties that mean all ranks and one
replica (`composer/utils/parallelism.py`). So a mesh of two dimensions, which its docstring describes, becomes one of
one dimension, without a warning. With the degrees as fields Composer makes the right mesh itself.

Delete once FSDP2Config takes the degrees; `test_fsdp2_config_has_no_degrees_of_its_own` then fails.
"""

from dataclasses import dataclass

from composer.utils.parallelism import FSDP2Config


@dataclass
class HybridFSDP2Config(FSDP2Config):
    """FSDP2's configuration with the degrees of FSDP1's; `FSDPConfig` has them."""

    data_parallel_shard_degree: int = -1  # pyright: ignore[reportIncompatibleMethodOverride]
    data_parallel_replicate_degree: int | None = None  # pyright: ignore[reportIncompatibleMethodOverride]
