"""Keywords of Composer 0.32, Streaming 0.13 and torch 2.7 that the recipe sets itself, and what to write instead.

Not a fix: their signatures cannot say so. Remove an entry if its library drops the keyword.
"""

from collections.abc import Mapping
from typing import Any

OWNED_BY_TRAINER: Mapping[str, str] = {
    "model": "set the sections `model`, `detection_head` and `caption_decoder`",
    "train_dataloader": "set the section `train_loader`",
    "eval_dataloader": "set the section `eval_loader`",
    "optimizers": "set the section `optimizer`",
    "schedulers": "set the section `scheduler`",
    "loggers": "set the section `loggers`",
    "callbacks": "set the section `callbacks`",
    "algorithms": "leave it out: no algorithm can be configured",
    "seed": "set `seed` at the top of the yaml",
    "load_path": "set `load_path` at the top of the yaml",
    "autoresume": "set `autoresume` at the top of the yaml",
    "scale_schedule_ratio": "set `max_duration`, and the times of `scheduler` and `staged_freezing`",
    "train_subset_num_batches": "set `max_duration` in batches, such as 100ba",
    "accumulate_train_batch_on_tokens": "leave it out: the losses are already normalised over the whole batch",
    **dict.fromkeys(("max_epochs", "num_epochs", "num_train_epochs", "epochs"), "set `max_duration`, such as 4ep"),
    **dict.fromkeys(("max_steps", "num_steps"), "set `max_duration` in batches, such as 500ba"),
}
OWNED_BY_DATASET: Mapping[str, str] = {
    "streams": "set `streams` next to `dataset`",
    **dict.fromkeys(("remote", "local", "split"), "set it in one of `streams`"),
    "batch_size": "set `global_batch_size`",
    "batching_method": "leave it out: the plan of the epoch makes the batches",
    "partition_algo": "leave it out: the plan of the epoch assigns the packs",
    "replication": "leave it out: every rank is assigned its own packs",
}
OWNED_BY_DATALOADER: Mapping[str, str] = {
    "dataset": "set `dataset` next to `dataloader`",
    "batch_size": "set `global_batch_size`",
    "shuffle": "set `dataset.shuffle`",
    **dict.fromkeys(("sampler", "batch_sampler"), "leave it out: Streaming orders the samples"),
    "collate_fn": "set `collator`",
}
OWNED_BY_CALLBACKS: Mapping[str, str] = {
    "checkpoint_saver": "set `trainer.save_interval`",
    "nan_monitor": "leave it out: it ends the run at a NaN, from which `nan_rollback` recovers",
}
_CHECKPOINTING = "set model.gradient_checkpointing, which also works without FSDP"
OWNED_BY_FSDP: Mapping[str, str] = {
    **dict.fromkeys(("activation_checkpointing", "activation_checkpointing_reentrant"), _CHECKPOINTING),
    "activation_cpu_offload": "it renames the parameters; " + _CHECKPOINTING,
    "auto_wrap": "leave it out: recipe/optim/fsdp.py chooses the units",
    "cpu_offload": "leave it out: Composer does not support it yet",
    **dict.fromkeys(
        ("device_mesh", "process_group"),
        "set data_parallel_shard_degree and data_parallel_replicate_degree, from which Composer makes them",
    ),
    "ignored_modules": "leave it out: nothing stays unsharded",
    **dict.fromkeys(("load_planner", "save_planner"), "leave it out: a yaml cannot hold its value"),
    **dict.fromkeys(
        ("te_checkpoint_wrapper", "te_shard_fp8_weight"), "leave it out: no Transformer Engine layers are used"
    ),
    "use_orig_params": "leave it out: parameter groups need it to be true",
}
FSDP_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "backward_prefetch": ("BACKWARD_PRE", "BACKWARD_POST", "NONE"),
    "mixed_precision": ("DEFAULT", "PURE", "FULL"),
    "reshard_after_forward": (True, False),
    "sharding_strategy": ("FULL_SHARD", "SHARD_GRAD_OP"),
    "state_dict_type": ("full", "sharded"),
}
