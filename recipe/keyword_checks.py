"""Judge the sections that hold other libraries' keywords, by the signatures of what these are given to."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from composer import Callback, Time, Trainer
from composer.core import Precision
from streaming import Stream, StreamingDataset
from torch.utils.data import DataLoader

from recipe.config import ConfigError, LoaderConfig, nearest

# Keywords of other libraries that the recipe sets itself, and what to write instead.
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
    "accumulate_train_batch_on_tokens": "leave it out: the losses are normalised over the whole batch already",
}
_OWNED_BY_STREAMS = "set it in one of `streams`"
OWNED_BY_DATASET: Mapping[str, str] = {
    "streams": "set `streams` beside `dataset`",
    "remote": _OWNED_BY_STREAMS,
    "local": _OWNED_BY_STREAMS,
    "split": _OWNED_BY_STREAMS,
    "batch_size": "set `global_batch_size`",
    "batching_method": "leave it out: the plan of the epoch makes the batches",
    "partition_algo": "leave it out: the plan of the epoch deals the packs",
    "replication": "leave it out: every rank is dealt packs of its own",
}
OWNED_BY_DATALOADER: Mapping[str, str] = {
    "dataset": "set `dataset` beside `dataloader`",
    "batch_size": "set `global_batch_size`",
    "shuffle": "set `dataset.shuffle`",
    "sampler": "leave it out: Streaming orders the samples",
    "batch_sampler": "leave it out: Streaming orders the samples",
    "collate_fn": "set `collator`",
}
OWNED_BY_CALLBACKS: Mapping[str, str] = {
    "checkpoint_saver": "set `trainer.save_interval`",
    "nan_monitor": "leave it out: it ends the run where `nan_rollback` mends it",
}


def check_keywords(
    where: str, keywords: Mapping[str, Any], function: Callable[..., Any], owned: Mapping[str, str]
) -> None:
    """Checks keywords of another library against the signature of what they will be given to.

    Args:
        where: The section, for the message.
        keywords: To check.
        function: A class, or what will be called.
        owned: Keywords that may not be given, and what to do instead.

    Raises:
        ConfigError: A keyword is owned, unknown, or required and missing.
    """
    parameters = dict(inspect.signature(function).parameters)
    if isinstance(function, type) and function.__init__ is Callback.__init__:
        parameters = {}  # Composer's base class swallows any keyword
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in keywords:
        if key in owned:
            raise ConfigError(f"{where}.{key} cannot be set: {owned[key]}")
        if key not in parameters and not takes_any:
            names = [name for name in parameters if name not in owned]
            remedy = nearest(key, names) if names else "it takes none"
            raise ConfigError(f"unknown key {where}.{key}: {remedy}")
    for name, parameter in parameters.items():
        named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if named and parameter.default is parameter.empty and name not in keywords and name not in owned:
            raise ConfigError(f"missing {where}.{name}: {getattr(function, '__name__', function)} needs it")


def check_loader(where: str, loader: LoaderConfig) -> None:
    """Checks a loader's streams, dataset and dataloader. Raises ConfigError as `check_keywords` does."""
    if not loader.streams:
        raise ConfigError(f"{where}.streams is empty: name at least one stream, such as `{{main: {{local: FOLDER}}}}`")
    for name, keywords in loader.streams.items():
        check_stream(f"{where}.streams.{name}", keywords)
    check_keywords(f"{where}.dataset", loader.dataset, StreamingDataset, OWNED_BY_DATASET)
    check_keywords(f"{where}.dataloader", loader.dataloader, DataLoader, OWNED_BY_DATALOADER)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if loader.global_batch_size % world_size:
        raise ConfigError(
            f"{where}.global_batch_size {loader.global_batch_size} cannot be shared by {world_size} ranks: "
            f"make it a multiple of {world_size}"
        )


def check_stream(where: str, keywords: object) -> None:
    """Checks the keywords of one `streaming.Stream`. Raises ConfigError as `check_keywords` does."""
    if not isinstance(keywords, Mapping):
        raise ConfigError(f"{where} is {keywords!r}: it takes the keywords of streaming.Stream, such as local: FOLDER")
    check_keywords(where, keywords, Stream, {})
    if keywords.get("local") is None and keywords.get("remote") is None:
        raise ConfigError(f"{where} has neither local nor remote: give the folder or address of the converted data")


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Checks the keywords of `composer.Trainer`. Raises ConfigError as `check_keywords` does."""
    check_keywords("trainer", trainer, Trainer, OWNED_BY_TRAINER)
    if "max_duration" not in trainer:
        raise ConfigError("missing trainer.max_duration: set how long to train, such as 10ep or 500ba")
    for key in ("max_duration", "eval_interval", "save_interval", "console_log_interval"):
        if trainer.get(key) is not None:
            check_time(f"trainer.{key}", trainer[key])
    microbatch = trainer.get("device_train_microbatch_size")
    if microbatch == "auto":
        raise ConfigError(
            "trainer.device_train_microbatch_size: auto breaks the exact normalisation of the losses; "
            "give the number of samples that fit on a device"
        )
    if microbatch is not None and not (isinstance(microbatch, int) and microbatch > 0):
        raise ConfigError(f"trainer.device_train_microbatch_size is {microbatch!r}: it must be a whole number above 0")
    if trainer.get("precision") is not None:
        check_choice("trainer.precision", trainer["precision"], [precision.value for precision in Precision])
    elif torch.cuda.is_available() and trainer.get("device") != "cpu":
        raise ConfigError("missing trainer.precision: Composer would take amp_fp16 on a GPU; set amp_bf16, or fp32")
    if trainer.get("precision") == Precision.AMP_FP16.value:
        raise ConfigError(
            "trainer.precision amp_fp16 finds its loss scale by gradients that overflow, which nan_rollback would take "
            "for divergence: use amp_bf16"
        )


def check_table(where: str, chosen: Mapping[str, Any], table: Mapping[str, type[Callback]]) -> None:
    """Checks names and keywords of callbacks or loggers. Raises ConfigError as `check_keywords` does."""
    for name, keywords in chosen.items():
        if name in OWNED_BY_CALLBACKS:
            raise ConfigError(f"{where}.{name} cannot be set: {OWNED_BY_CALLBACKS[name]}")
        if name not in table:
            raise ConfigError(f"unknown key {where}.{name}: {nearest(name, list(table))}")
        if keywords is None:
            continue
        if not isinstance(keywords, Mapping):
            raise ConfigError(f"{where}.{name} is {keywords!r}: give keywords, {{}} for none, or null to switch it off")
        check_keywords(f"{where}.{name}", keywords, table[name], {})


def check_choice(key: str, value: object, allowed: Sequence[str]) -> None:
    """Raises ConfigError where the value is none of the allowed."""
    if value not in allowed:
        raise ConfigError(f"{key} is {value!r}: it must be one of {', '.join(allowed)}")


def check_time(key: str, value: object) -> None:
    """Raises ConfigError where the value is no duration of Composer."""
    try:
        # Composer reads a text without a unit as seconds, which nobody means.
        if isinstance(value, str) and not value.isdigit() and Time.from_timestring(value).value >= 0:
            return
    except (ValueError, TypeError):
        pass
    if type(value) is int and value >= 0:
        return
    raise ConfigError(f"{key} is {value!r}: it must be a duration such as 10ep, 500ba, 1000sp, 20000tok or 0.1dur")
