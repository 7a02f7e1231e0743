"""Judge a configuration before anything is built: values, combinations, other libraries' keywords."""

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import reduce
from math import inf
from typing import Any, NoReturn

import torch
from composer import Callback, Time, Trainer
from composer.core import Precision
from streaming import Stream, StreamingDataset
from torch.utils.data import DataLoader

from recipe.algorithms.watch import Action
from recipe.build import check_width
from recipe.callbacks.table import CALLBACKS, LOGGERS
from recipe.checkpoints.save import save_folder
from recipe.config import (
    GROUPS,
    ConfigError,
    EmaConfig,
    EvaluationConfig,
    LoaderConfig,
    NaNRollbackConfig,
    RecipeConfig,
    nearest,
)
from recipe.configure import load_config
from recipe.optim.fsdp import check_parallelism
from recipe.optim.schedule import parse_stages
from recipe.redact import redact_text

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


CHOICES: Mapping[str, Sequence[str]] = {
    "model.attn_implementation": ("auto", "eager", "sdpa", "flash_attention_2"),
    "model.dtype": ("float32", "bfloat16", "float64"),
    "prompt.box_coordinates": ("absolute", "normalized_1000"),
    "train_loader.collator": ("standard", "packed"),
    "eval_loader.collator": ("standard", "packed"),
    "train_loader.on_bad_sample": ("raise", "skip"),
    "eval_loader.on_bad_sample": ("raise",),
    "optimizer.lr_scaling": ("none", "linear", "sqrt"),
    "scheduler.name": ("cosine", "linear", "constant"),
    "loss.objectness": ("focal", "mal"),
    "save_best.mode": ("max", "min"),
}
# Least and greatest allowed value.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "max_seq_len": (1, inf),
    "detection_head.num_queries": (1, inf),
    "detection_head.width": (1, inf),
    "detection_head.num_heads": (1, inf),
    "detection_head.num_layers": (1, inf),
    "detection_head.num_query_groups": (1, inf),
    "detection_head.ffn_factor": (1, inf),
    "detection_head.dropout": (0, 1),
    "detection_head.adapter_ratio": (1, inf),
    "detection_head.num_denoising_groups": (0, inf),
    "detection_head.box_noise": (0, 1),
    "caption_decoder.num_layers": (1, inf),
    "caption_decoder.num_heads": (1, inf),
    "caption_decoder.ffn_factor": (1, inf),
    "caption_decoder.dropout": (0, 1),
    "caption_decoder.max_caption_tokens": (2, inf),
    "image.min_pixels": (1, inf),
    "image.max_pixels": (1, inf),
    "teachers.num_teachers": (0, inf),
    "teachers.teacher_ratio": (0, 1),
    "train_loader.global_batch_size": (1, inf),
    "train_loader.max_bad_samples": (0, inf),
    "eval_loader.global_batch_size": (1, inf),
    "evaluation.score_threshold": (0, 1),
    "evaluation.max_captions": (0, inf),
    "evaluation.max_new_tokens": (1, inf),
    "evaluation.nms_iou": (0, 1),
    "evaluation.num_logged_images": (0, inf),
    "loss.weight_lm_teacher": (0, inf),
    "loss.weight_lm_student": (0, inf),
    "loss.weight_bbox": (0, inf),
    "loss.weight_giou": (0, inf),
    "loss.weight_objectness": (0, inf),
    "loss.weight_caption": (0, inf),
    "loss.focal_alpha": (0, 1),
    "loss.focal_gamma": (0, inf),
    "matcher.cost_bbox": (0, inf),
    "matcher.cost_giou": (0, inf),
    "matcher.cost_objectness": (0, inf),
    "optimizer.lr_vision": (0, inf),
    "optimizer.lr_merger": (0, inf),
    "optimizer.lr_llm": (0, inf),
    "optimizer.lr_adapter": (0, inf),
    "optimizer.lr_detection": (0, inf),
    "optimizer.eps": (0, inf),
    "optimizer.weight_decay": (0, inf),
    "optimizer.clip_norm": (1e-6, inf),
    "optimizer.reference_tokens": (1, inf),
    "scheduler.alpha_f": (0, inf),
    "staged_freezing.detection_freeze_epochs": (0, inf),
    "nan_rollback.strikes": (1, inf),
    "nan_rollback.lr_factor": (1e-6, 1),
    "nan_rollback.clip_factor": (1e-6, 1),
    "nan_rollback.max_rollbacks": (0, inf),
    "nan_rollback.max_skipped": (0, inf),
    "nan_rollback.skipped_window": (1, inf),
    "nan_rollback.quarantine_after": (1, inf),
}


def config_from_command_line(arguments: Sequence[str], required: Sequence[str] = ()) -> RecipeConfig:
    """Reads `YAML [key.sub=value ...]`; on a mistake prints one line and exits with status 2.

    Args:
        arguments: Of the command.
        required: Keys that this command needs although they may be null.
    """
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        _exit("usage: YAML [key.sub=value ...]")
    try:
        config = load_config(arguments[0], arguments[1:])
        check_config(config)
        for key in required:
            if _get(config, key) is None:
                raise ConfigError(f"missing {key}: add {key}=VALUE to the command")
    except ConfigError as error:
        _exit(f"configuration error: {error}")
    return config


def check_config(config: RecipeConfig) -> None:
    """Checks everything that can be checked without reading data or weights.

    Raises:
        ConfigError: Naming the key and the remedy.
    """
    for key, allowed in CHOICES.items():
        check_choice(key, _get(config, key), allowed)
    for key, (least, greatest) in BOUNDS.items():
        value = _get(config, key)
        # Written so that NaN fails too.
        if value is not None and not (least <= value <= greatest and value < inf):
            span = f"{least} or more" if greatest == inf else f"between {least} and {greatest}"
            raise ConfigError(f"{key} is {value}: it must be {span}")
    _check_head(config)
    _check_images_and_checkpoint(config)
    _check_optimization(config)
    if config.ema is not None:
        _check_ema(config.ema)
    _check_scores(config.evaluation)
    _check_nan_rollback(config.nan_rollback)
    _check_teachers(config)
    check_loader("train_loader", config.train_loader)
    check_loader("eval_loader", config.eval_loader)
    _check_packing(config)
    check_trainer(config.trainer)
    check_parallelism(config.trainer, config.fsdp_version)
    _check_schedule(config)
    _check_saving(config)
    check_table("callbacks", config.callbacks, CALLBACKS)
    check_table("loggers", config.loggers, LOGGERS)


def _check_head(config: RecipeConfig) -> None:
    head = config.detection_head
    if head.num_denoising_groups and head.box_noise <= 0:
        raise ConfigError(
            f"detection_head.box_noise is {head.box_noise}: denoising needs noise above 0, or num_denoising_groups: 0"
        )
    if head.width is not None:  # else the language model's, which is not known yet
        check_width(head.width, config)


def _check_images_and_checkpoint(config: RecipeConfig) -> None:
    least, most = config.image.min_pixels, config.image.max_pixels
    if least is not None and most is not None and least > most:
        raise ConfigError(f"image.min_pixels {least} is above image.max_pixels {most}: lower one or raise the other")
    path = config.load_path
    if path is not None and "://" not in path and "{" not in path and not os.path.exists(path):
        raise ConfigError(f"load_path {path} does not exist: give a checkpoint that a run saved, or null")


def _check_optimization(config: RecipeConfig) -> None:
    optimizer = config.optimizer
    rates = [optimizer.lr_vision, optimizer.lr_merger, optimizer.lr_llm, optimizer.lr_adapter, optimizer.lr_detection]
    if not any(rates):
        raise ConfigError("optimizer.lr_*: all are 0, so nothing would train; set at least one above 0")
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ConfigError(f"optimizer.betas is {optimizer.betas}: it must be two numbers from 0 to below 1")
    if optimizer.lr_scaling != "none" and optimizer.reference_tokens is None:
        raise ConfigError(
            f"optimizer.lr_scaling is {optimizer.lr_scaling} but optimizer.reference_tokens is missing: "
            "set the tokens per step that the rates are meant for, or lr_scaling: none"
        )
    check_time("scheduler.t_warmup", config.scheduler.t_warmup)
    if not any(value for name, value in vars(config.loss).items() if name.startswith("weight_")):
        raise ConfigError("loss.weight_*: all are 0, so nothing would train; set at least one above 0")


def _check_ema(config: EmaConfig) -> None:
    if (config.half_life is None) == (config.smoothing is None):
        raise ConfigError(
            f"ema.half_life is {config.half_life} and ema.smoothing is {config.smoothing}: set one of them, and the "
            "other to null"
        )
    if config.smoothing is not None and not 0 < config.smoothing < 1:
        raise ConfigError(f"ema.smoothing is {config.smoothing}: it must be above 0 and below 1, such as 0.99")
    for name, time in (("half_life", config.half_life), ("update_interval", config.update_interval)):
        if time is not None and not re.fullmatch(r"0*[1-9]\d*ba", time):
            raise ConfigError(f"ema.{name} is {time!r}: it must be one batch or more, such as 100ba")


def _check_scores(config: EvaluationConfig) -> None:
    if not 0 < config.score_scale < inf:
        raise ConfigError(f"evaluation.score_scale is {config.score_scale}: it must be above 0, or ranks would turn")
    if not -inf < config.score_shift < inf:
        raise ConfigError(f"evaluation.score_shift is {config.score_shift}: it must be a number")


def _check_nan_rollback(config: NaNRollbackConfig) -> None:
    times = {"snapshot_interval": (config.snapshot_interval, 1)}
    if config.detect_anomaly is not None:
        times["detect_anomaly.start"] = (config.detect_anomaly.start, 0)
    for name, (time, least) in times.items():
        if not re.fullmatch(r"\d+ba", time) or int(time.removesuffix("ba")) < least:
            raise ConfigError(f"nan_rollback.{name} is {time!r}: it must be {least} batches or more, such as 50ba")
    for name, section in vars(config).items():
        if not is_dataclass(section):
            continue
        for key, value in vars(section).items():
            if key == "action":
                check_choice(f"nan_rollback.{name}.action", value, [action.name.lower() for action in Action])
            elif not isinstance(value, str) and not 0 < value < inf:
                raise ConfigError(f"nan_rollback.{name}.{key} is {value}: it must be above 0")
    if config.nan_ratio is not None and config.nan_ratio.ratio > 1:
        raise ConfigError(f"nan_rollback.nan_ratio.ratio is {config.nan_ratio.ratio}: it must be a share, 1 or less")


def _check_schedule(config: RecipeConfig) -> None:
    for group, curve in config.scheduler.groups.items():
        where = f"scheduler.groups.{group}"
        check_choice("a key of scheduler.groups", group, GROUPS)
        check_choice(f"{where}.name", curve.name, CHOICES["scheduler.name"])
        check_time(f"{where}.t_warmup", curve.t_warmup)
        if not 0 <= curve.alpha_f < inf:
            raise ConfigError(f"{where}.alpha_f is {curve.alpha_f}: it must be 0 or more")
    parse_stages(config)


def _check_teachers(config: RecipeConfig) -> None:
    teachers = config.teachers
    if teachers.stream is not None:
        check_stream("teachers.stream", teachers.stream)
    elif teachers.num_teachers > 0:
        raise ConfigError(
            f"teachers.num_teachers is {teachers.num_teachers} but teachers.stream is null: "
            "give the pool's stream (see convert/teachers.py), or num_teachers: 0"
        )


def _check_packing(config: RecipeConfig) -> None:
    if config.eval_loader.packing is not None:
        raise ConfigError("eval_loader.packing: only training is packed by plan; leave it out, or set collator: packed")
    packing = config.train_loader.packing
    if packing is None:
        return
    where = "train_loader.packing"
    if config.train_loader.collator != "packed":
        raise ConfigError(f"{where} needs train_loader.collator: packed, which lays the samples of a pack in one row")
    check_choice(f"{where}.on_long_sample", packing.on_long_sample, ("raise", "skip"))
    for name in ("max_tokens", "max_patches", "window"):
        value = getattr(packing, name)
        if value is not None and value < 1:
            raise ConfigError(f"{where}.{name} is {value}: it must be 1 or more")


def _check_saving(config: RecipeConfig) -> None:
    trainer = config.trainer
    name = trainer.get("save_filename", "ba{batch}.pt")
    if "{batch}" not in name or not name.endswith(".pt"):
        raise ConfigError(
            f"trainer.save_filename is {name!r}: it must hold {{batch}}, so that an older checkpoint is left where the "
            "newest is broken, and end in .pt"
        )
    fsdp = (trainer.get("parallelism_config") or {}).get("fsdp") or {}
    prefix = fsdp.get("sharded_ckpt_prefix_dir", "ba{batch}")
    if "{batch}" not in prefix:
        raise ConfigError(
            f"trainer.parallelism_config.fsdp.sharded_ckpt_prefix_dir is {prefix!r}: it must hold {{batch}}, so that "
            "an older checkpoint is left where the newest is broken"
        )
    folder = save_folder(config)
    if folder is not None and "{" in folder:
        raise ConfigError(
            f"trainer.save_folder, or run_folder, makes {folder!r}: write the name out, so that the checkpoints are "
            "found where the run is started again"
        )
    kept = trainer.get("save_num_checkpoints_to_keep", -1)
    if type(kept) is not int or not (kept == -1 or kept >= 1):
        raise ConfigError(
            f"trainer.save_num_checkpoints_to_keep is {kept!r}: it must be 1 or more, or -1 for all; what is uploaded "
            "to a store is never removed"
        )
    if config.autoresume and trainer.get("save_ignore_keys"):
        raise ConfigError(
            "trainer.save_ignore_keys: a run could not go on as before from a checkpoint that lacks something; leave "
            "it out, or set autoresume: false"
        )
    if config.save_best.metric is not None and folder is None:
        raise ConfigError("save_best.metric is set but trainer.save_folder is null: give a folder")


def _get(config: RecipeConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def _exit(message: str) -> NoReturn:
    # On every rank: the launcher may end rank 0 before it prints, and then shows what the others wrote.
    print(redact_text(message), file=sys.stderr)
    raise SystemExit(2)
