"""Check what needs no other library: values, combinations, and keywords that the recipe owns.

`recipe.config` holds the bounds and choices of each key; this file applies them and checks combinations of keys.
`recipe.checks` checks what needs libraries, the machine or data. Every function raises ConfigError with the key, its
value and the remedy.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from math import inf
from operator import ge, gt, le, lt
from typing import Any

from recipe.config import (
    FROZEN,
    CaptionDecoderConfig,
    ConfigError,
    DetectionHeadConfig,
    LoaderConfig,
    OptimizerConfig,
    RecipeConfig,
    StagedFreezingConfig,
    StageEntry,
    groups_of,
    nearest,
)
from recipe.upstream.owned_keywords import (
    FSDP_CHOICES,
    OWNED_BY_CALLBACKS,
    OWNED_BY_DATALOADER,
    OWNED_BY_DATASET,
    OWNED_BY_FSDP,
    OWNED_BY_TRAINER,
)
from recipe.upstream.trainer_section import TrainerView, shards_and_replicas, view_trainer

log = logging.getLogger(__name__)


def check_config(config: RecipeConfig, world_size: int | None = None) -> None:
    """Raise ConfigError at the first wrong key or combination of keys; the ranks are the launcher's if not given."""
    check_fields(config)
    _check_model(config)
    _check_optimization(config)
    _check_loader("train_loader", config.train_loader)
    _check_loader("eval_loader", config.eval_loader, may_be_empty=config.val_fraction is not None)
    _check_data(config)
    check_trainer(config.trainer)
    check_ranks(config, world_size or int(os.environ.get("WORLD_SIZE", "1")))
    view = view_trainer(config)
    check_stages(config, view.max_duration)
    _check_warmups(config, view.max_duration)
    _check_saving(config, view)
    for where, section in (("callbacks", config.callbacks), ("loggers", config.loggers)):
        for name, value in section.items():
            if value is not None and not isinstance(value, Mapping):
                raise ConfigError(f"{where}.{name} is {value!r}: give keywords, {{}} for none, or null for off")
            label = (value or {}).get("dataloader_label", "eval")
            if name.endswith("_stopper") and label != "eval":
                raise ConfigError(f"{where}.{name}.dataloader_label is {label!r}: only eval has metrics; set eval")


def check_fields(section: Any, prefix: str = "") -> None:
    """Raise ConfigError if a value of a dataclass, or of one inside it, breaks the rule at its field."""
    for entry in fields(section):
        key, value, rule = prefix + entry.name, getattr(section, entry.name), entry.metadata
        if is_dataclass(value):
            check_fields(value, f"{key}.")
        elif "names" in rule:
            for name, item in value.items():
                if name in OWNED_BY_CALLBACKS:
                    raise ConfigError(f"{key}.{name} cannot be set: {OWNED_BY_CALLBACKS[name]}")
                if name not in rule["names"]:
                    raise ConfigError(f"unknown key {key}.{name}: {nearest(name, rule['names'])}")
                if is_dataclass(item):
                    check_fields(item, f"{key}.{name}.")
        elif value is None:
            continue
        elif hasattr(value, "append") and any(isinstance(item, list | dict) for item in value):
            raise ConfigError(f"{key} is {value!r}: it must be a plain list; quote an entry that holds a colon")
        elif "span" in rule:
            least, most = rule["span"]
            if len(value) != 2 or not least <= value[0] <= value[1] <= most:  # NaN fails too
                raise ConfigError(f"{key} is {value}: it must be two numbers from {least} to {most}, the lower first")
        elif "choices" in rule:
            _check_choice(key, value, rule["choices"])
        elif "duration" in rule:
            check_duration(key, value)
        elif "batches" in rule:
            if not re.fullmatch(r"\d+ba", value) or int(value.removesuffix("ba")) < rule["batches"]:
                least = "a number of batches" if rule["batches"] == 0 else f"{rule['batches']} batch or more"
                raise ConfigError(f"{key} is {value!r}: it must be {least}, such as 50ba")
        elif rule:
            _check_number(key, value, **rule)


def _check_number(
    key: str, value: float, least: float | None, most: float | None, above: float | None, below: float | None
) -> None:
    rules = (("above {}", above, gt), ("{} or more", least, ge), ("below {}", below, lt), ("{} or less", most, le))
    bounds = [(text, bound, holds) for text, bound, holds in rules if bound is not None]
    if -inf < value < inf and all(holds(value, bound) for _, bound, holds in bounds):  # NaN fails too
        return
    span = " and ".join(text.format(bound) for text, bound, _ in bounds if bound != -inf)
    span = span if least is None or most is None else f"between {least} and {most}"
    raise ConfigError(f"{key} is {value}: it must be {span or 'a finite number'}")


def _check_choice(key: str, value: object, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} is {value!r}: it must be one of {', '.join(map(str, allowed))}")


def parse_duration(text: object) -> tuple[float, str] | None:
    """Return value and unit of a duration as Composer reads it, such as (0.5, "dur"); None if it is not one."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d+)?|\.\d+)(ep|ba|sp|tok|dur|iter|sec)", str(text))
    if found is None or not (value := float(found[1])) < inf or (found[2] != "dur" and value != int(value)):
        return None
    return value, found[2]


def check_duration(key: str, value: object) -> None:
    """Raise ConfigError unless Composer reads the value as a duration; a plain number counts epochs."""
    # Not a text without a unit, which Composer reads as seconds and nobody means.
    is_clock = isinstance(value, str) and re.fullmatch(r"(?=\d)(\d+h)?(\d+m)?(\d+s)?", value)
    if is_clock or (isinstance(value, str) and parse_duration(value)) or (type(value) is int and value >= 0):
        return
    raise ConfigError(f"{key} is {value!r}: it must be a duration such as 10ep, 500ba, 1000sp, 20000tok or 0.1dur")


def check_head(head: DetectionHeadConfig, decoder: CaptionDecoderConfig, width: int | None) -> None:
    """Raise ConfigError at a wrong combination of keys; `width`: None if it is the language model's, not yet known."""
    if head.num_denoising_groups and head.box_noise <= 0:
        raise ConfigError(f"detection_head.box_noise is {head.box_noise}: give above 0, or num_denoising_groups: 0")
    if head.select_queries and not head.multi_scale:
        raise ConfigError(
            "detection_head.select_queries chooses from the maps of multi_scale, which is false (in older versions: "
            "from vision tokens): set select_queries=false, or multi_scale=true"
        )
    divisors = {
        f"detection_head.num_heads {head.num_heads}": head.num_heads,
        f"caption_decoder.num_heads {decoder.num_heads}": decoder.num_heads,
        "8, as the positions of boxes need": 8,  # sine and cosine of four coordinates
    }
    for what, divisor in divisors.items():
        if width is not None and width % divisor:
            why = f"is not a multiple of {what}; null takes the language model's width"
            raise ConfigError(f"detection_head.width {width} {why}")


def _check_model(config: RecipeConfig) -> None:
    if config.detection_head is not None:
        check_head(config.detection_head, config.caption_decoder, config.detection_head.width)
    least, most = config.image.min_pixels, config.image.max_pixels
    if least is not None and most is not None and least > most:
        raise ConfigError(f"image.min_pixels {least} is above image.max_pixels {most}: lower one or raise the other")
    if (path := config.load_path) is not None and "://" not in path and "{" not in path and not os.path.exists(path):
        raise ConfigError(f"load_path {path} does not exist: give a checkpoint that a run saved, or null")


def _check_optimization(config: RecipeConfig) -> None:
    optimizer, ema = config.optimizer, config.ema
    if not any(getattr(optimizer, f"lr_{group}") for group in groups_of(config)):
        raise ConfigError("optimizer.lr_*: all are 0, so nothing would train; set at least one above 0")
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ConfigError(f"optimizer.betas is {optimizer.betas}: it must be two numbers from 0 to below 1")
    if optimizer.lr_scaling != "none" and optimizer.reference_tokens is None:
        raise ConfigError(
            f"optimizer.lr_scaling is {optimizer.lr_scaling} but optimizer.reference_tokens is missing: "
            "set it to the tokens per step that the rates are meant for, or set lr_scaling: none"
        )
    if not any(value for name, value in vars(config.loss).items() if name.startswith("weight_")):
        raise ConfigError("loss.weight_*: all are 0, so nothing would train; set at least one above 0")
    if ema is not None and (ema.half_life is None) == (ema.smoothing is None):
        raise ConfigError(
            f"ema.half_life is {ema.half_life} and ema.smoothing is {ema.smoothing}: set one, and the other to null"
        )


def _check_warmups(config: RecipeConfig, max_duration: str | int | None) -> None:
    """Raise ConfigError at a warm-up whose unit does not compare with that of the run, before Composer does."""
    curves = {f"scheduler.groups.{group}": curve for group, curve in config.scheduler.groups.items()}
    length = parse_duration(f"{max_duration}ep" if isinstance(max_duration, int) else max_duration)
    for where, curve in {"scheduler": config.scheduler, **curves}.items():
        warmup = parse_duration(curve.t_warmup)
        if warmup is not None and (warmup[0] == 0 or warmup[1] == "dur"):
            continue
        units = (warmup and warmup[1], length and length[1])
        if (units[0] != units[1] and not set(units) <= {"ep", "ba"}) or units[0] in (None, "sec", "iter"):
            raise ConfigError(
                f"{where}.t_warmup is {curve.t_warmup!r}, which does not compare with trainer.max_duration "
                f"{max_duration!r}: give a share of the run, such as 0.1dur, or the same unit"
            )


def _check_loader(where: str, loader: LoaderConfig, may_be_empty: bool = False) -> None:
    if not loader.streams and not may_be_empty:
        raise ConfigError(f"{where}.streams is empty: name at least one stream, such as `{{main: {{local: FOLDER}}}}`")
    for name, keywords in loader.streams.items():
        check_stream(f"{where}.streams.{name}", keywords)
    _check_owned(f"{where}.dataset", loader.dataset, OWNED_BY_DATASET)
    _check_owned(f"{where}.dataloader", loader.dataloader, OWNED_BY_DATALOADER)


def check_ranks(config: RecipeConfig, world_size: int) -> None:
    """Raise ConfigError unless the ranks divide the batches and fill FSDP's groups."""
    shards_and_replicas(view_trainer(config).fsdp, world_size)
    why = f"cannot be shared by {world_size} ranks: make it a multiple of {world_size}"
    for where, loader in (("train_loader", config.train_loader), ("eval_loader", config.eval_loader)):
        if loader.global_batch_size % world_size:
            raise ConfigError(f"{where}.global_batch_size {loader.global_batch_size} {why}")


def check_stream(where: str, keywords: object) -> None:
    """Raise ConfigError unless a stream has keywords, and a place to read from."""
    if not isinstance(keywords, Mapping):
        raise ConfigError(f"{where} is {keywords!r}: it takes the keywords of streaming.Stream, such as local: FOLDER")
    if keywords.get("local") is None and keywords.get("remote") is None:
        raise ConfigError(f"{where} has neither local nor remote: give the folder or address of the converted data")


def _check_owned(where: str, keywords: Mapping[str, Any], owned: Mapping[str, str]) -> None:
    for key in filter(owned.__contains__, keywords):
        raise ConfigError(f"{where}.{key} cannot be set: {owned[key]}")


def _check_data(config: RecipeConfig) -> None:
    teachers, loader = config.teachers, config.train_loader
    if config.val_fraction is not None and config.eval_loader.streams:
        raise ConfigError("val_fraction and eval_loader.streams both choose what is evaluated: set one of them to null")
    if teachers.stream is not None:
        check_stream("teachers.stream", teachers.stream)
    elif teachers.num_teachers > 0:
        raise ConfigError(
            f"teachers.num_teachers is {teachers.num_teachers} but teachers.stream is null: "
            "give the pool's stream (see convert/teachers.py), or num_teachers: 0"
        )
    whole = {f"eval_loader.streams.{name}": keywords for name, keywords in config.eval_loader.streams.items()}
    whole |= {"eval_loader.dataset": config.eval_loader.dataset, "teachers.stream": teachers.stream or {}}
    for where, keywords in whole.items():
        check_whole(where, keywords)
    parts = {f"train_loader.streams.{name}": keywords for name, keywords in loader.streams.items()}
    for where, keywords in {**parts, "train_loader.dataset": loader.dataset}.items():
        for key in ("choose", "repeat", "proportion", "epoch_size"):
            if keywords.get(key) in (0, "0"):
                raise ConfigError(f"{where}.{key} is 0, which leaves no samples: give more than 0, or leave it out")
    if config.eval_loader.packing is not None:
        raise ConfigError("eval_loader.packing: only training is packed by plan; leave it out, or set collator: packed")
    if config.eval_loader.augment is not None:
        raise ConfigError("eval_loader.augment: an evaluation sees every image as it is; leave it out")
    if loader.packing is not None and loader.collator != "packed":
        raise ConfigError("train_loader.packing needs train_loader.collator: packed, which puts a pack into one row")


def check_whole(where: str, keywords: Mapping[str, Any]) -> None:
    """Raise ConfigError at a keyword that would sample a set of which every sample is read once."""
    for key in ("choose", "repeat", "proportion", "epoch_size"):
        if keywords.get(key) is not None:
            subset = ", or set trainer.eval_subset_num_batches" if where.startswith("eval_loader") else ""
            raise ConfigError(
                f"{where}.{key} is {keywords[key]!r}, but every sample is read once: leave it out and convert a "
                f"smaller set{subset}"
            )


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Raise ConfigError at a wrong value of the section `trainer`; `recipe.checks` checks the names of its keys."""
    _check_owned("trainer", trainer, OWNED_BY_TRAINER)
    if "max_duration" not in trainer:
        raise ConfigError("missing trainer.max_duration: set how long to train, such as 10ep or 500ba")
    for key in ("max_duration", "eval_interval", "save_interval", "console_log_interval"):
        if trainer.get(key) is not None:
            check_duration(f"trainer.{key}", trainer[key])
    subset = trainer.get("eval_subset_num_batches", -1)
    if subset is not None and (type(subset) is not int or not (subset == -1 or subset >= 1)):
        raise ConfigError(
            f"trainer.eval_subset_num_batches is {subset!r}: it must be 1 or more, or -1 for all; "
            "trainer.eval_interval=0 evaluates never"
        )
    if trainer["max_duration"] == 0 or (parse_duration(trainer["max_duration"]) or (1.0, ""))[0] == 0:
        raise ConfigError(f"trainer.max_duration is {trainer['max_duration']!r}: nothing would train; give 1ba or more")
    microbatch = trainer.get("device_train_microbatch_size")
    if microbatch == "auto":
        raise ConfigError(
            "trainer.device_train_microbatch_size: auto breaks the exact normalisation of the losses: give the number "
            "of packs that fit on a device; python -m recipe.estimate YAML --fit GIB says which packs do"
        )
    if microbatch is not None and not (isinstance(microbatch, int) and microbatch > 0):
        raise ConfigError(f"trainer.device_train_microbatch_size is {microbatch!r}: it must be a whole number above 0")
    if trainer.get("precision") is not None:
        _check_choice("trainer.precision", trainer["precision"], ("fp32", "amp_bf16", "amp_fp8", "amp_fp16"))
    if trainer.get("precision") == "amp_fp16":
        raise ConfigError(
            "trainer.precision amp_fp16 finds its loss scale by gradient overflows, which nan_rollback would take for "
            "divergence: use amp_bf16"
        )
    _check_parallelism(trainer)


def _check_parallelism(trainer: Mapping[str, Any]) -> None:
    """Check `trainer.parallelism_config`, whose unknown keys Composer ignores."""
    where = "trainer.parallelism_config"
    sections = trainer.get("parallelism_config") or {}
    if not isinstance(sections, Mapping):
        raise ConfigError(f"{where} is {sections!r}: give fsdp with its keywords, or null for DDP")
    for key in sections:
        if key == "fsdp2":
            raise ConfigError(
                f"{where}.fsdp2 is ignored by Composer, which would run plain DDP: write fsdp, "
                "and fsdp_version: 2 at the top of the yaml"
            )
        if key != "fsdp":
            raise ConfigError(f"a key of {where} is {key!r}: it must be fsdp")
    where, keywords = f"{where}.fsdp", sections.get("fsdp")
    if keywords is None:
        return
    if not isinstance(keywords, Mapping):
        raise ConfigError(f"{where} is {keywords!r}: give keywords, {{}} for none, or null for DDP")
    _check_owned(where, keywords, OWNED_BY_FSDP)
    for key, allowed in FSDP_CHOICES.items():
        if key in keywords:
            _check_choice(f"{where}.{key}", keywords[key], allowed)
    is_sharded = keywords.get("state_dict_type") == "sharded"
    if "sharded_ckpt_prefix_dir" in keywords and not is_sharded:
        raise ConfigError(f"{where}.sharded_ckpt_prefix_dir is ignored without state_dict_type: sharded; leave it out")
    if keywords.get("load_monolith_rank0_only") and is_sharded:
        raise ConfigError(f"{where}.load_monolith_rank0_only is for state_dict_type: full; leave it out")
    if trainer.get("precision") is None:
        raise ConfigError(f"missing trainer.precision: {where} needs it, such as amp_bf16 (fp32 on the CPU)")


def _check_saving(config: RecipeConfig, view: TrainerView) -> None:
    trainer, folder = config.trainer, view.save_folder
    name = trainer.get("save_filename", "ba{batch}.pt")
    why = "so that an older checkpoint remains if the newest is broken"
    if "{batch}" not in name or not name.endswith(".pt"):
        raise ConfigError(f"trainer.save_filename is {name!r}: it must hold {{batch}}, {why}, and end in .pt")
    prefix = (view.fsdp or {}).get("sharded_ckpt_prefix_dir", "ba{batch}")
    if "{batch}" not in prefix:
        where = "trainer.parallelism_config.fsdp.sharded_ckpt_prefix_dir"
        raise ConfigError(f"{where} is {prefix!r}: it must hold {{batch}}, {why}")
    if folder is not None and "{" in folder:
        raise ConfigError(
            f"trainer.save_folder, or run_folder, gives {folder!r}: write the name out, so that the checkpoints are "
            "found when the run is started again"
        )
    kept = trainer.get("save_num_checkpoints_to_keep", -1)
    if type(kept) is not int or not (kept == -1 or kept >= 1):
        raise ConfigError(f"trainer.save_num_checkpoints_to_keep is {kept!r}: it must be 1 or more, or -1 for all")
    if config.autoresume and trainer.get("save_ignore_keys"):
        raise ConfigError(
            "trainer.save_ignore_keys: a run cannot resume exactly from a checkpoint that lacks something; leave it "
            "out, or set autoresume: false"
        )
    if config.save_best.metric is not None and folder is None:
        raise ConfigError("save_best.metric is set but trainer.save_folder is null: give a folder")


def parse_stages(staged: StagedFreezingConfig, optimizer: OptimizerConfig) -> dict[str, list[StageEntry]]:
    """Return the stages of each group that has any and a learning rate, those of `detection_freeze_epochs` included."""
    where, epochs = "staged_freezing.groups", staged.detection_freeze_epochs
    given = {group: entries for group, entries in staged.groups.items() if entries is not None}
    groups = {group: _parse_entries(f"{where}.{group}", entries) for group, entries in given.items()}
    if epochs is not None:
        for group in ("adapter", "detection"):
            if group in groups:
                raise ConfigError(
                    f"staged_freezing.detection_freeze_epochs and {where}.{group} both say when to freeze {group}: "
                    f"give one of them, such as {where}.{group}=null"
                )
            if epochs and getattr(optimizer, f"lr_{group}"):
                groups[group] = [StageEntry("0ep", None), StageEntry(f"{epochs}ep", 1.0)]
    return {group: entries for group, entries in groups.items() if getattr(optimizer, f"lr_{group}")}


def _parse_entries(where: str, entries: Any) -> list[StageEntry]:
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise ConfigError(
            f"{where} is {entries!r}: give a list such as [{{from: 0ep, lr: frozen}}, {{from: 1ep, lr: 1}}], or null"
        )
    parsed = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or set(entry) - {"warmup"} != {"from", "lr"}:
            raise ConfigError(
                f"{where}[{index}] is {entry!r}: give `from` and `lr`, such as {{from: 1ep, lr: 0.1}}, and `warmup` if "
                "the rate is to rise from 0"
            )
        start, factor = entry["from"], entry["lr"]
        if (time := parse_duration(start)) is None or time[1] in ("sec", "iter"):
            raise ConfigError(
                f"{where}[{index}].from is {start!r}: it must be a time such as 2ep, 500ba, 1000sp (packs), 20000tok "
                "or 0.75dur; part of an epoch is a share of the run (dur)"
            )
        # Written so that NaN fails.
        is_factor = isinstance(factor, int | float) and not isinstance(factor, bool) and 0 <= factor < inf
        if factor != FROZEN and not is_factor:
            raise ConfigError(
                f"{where}[{index}].lr is {factor!r}: it must be {FROZEN}, or a factor on the learning rate of 0 or more"
            )
        warmup = entry.get("warmup")
        if warmup is not None:
            length = parse_duration(warmup)
            if factor == FROZEN or length is None or length[0] <= 0 or length[1] != time[1]:
                raise ConfigError(
                    f"{where}[{index}].warmup is {warmup!r}: it must be a time above 0 in the unit of `from` "
                    f"({time[1]}), and a frozen stage has none"
                )
        parsed.append(StageEntry(start, None if factor == FROZEN else float(factor), warmup))
    return parsed


def check_stages(config: RecipeConfig, max_duration: str | int | None) -> None:
    """Raise ConfigError if a group with stages never trains, or if nothing trains at first."""
    groups, where = parse_stages(config.staged_freezing, config.optimizer), "staged_freezing.groups"
    for group in config.staged_freezing.groups:
        if group not in groups_of(config):
            log.info("lora is not set for the group %s: %s.%s has no effect", group, where, group)
        elif not getattr(config.optimizer, f"lr_{group}"):
            log.info("optimizer.lr_%s is 0: frozen throughout, %s.%s has no effect", group, where, group)
    for group, stages in groups.items():
        reached = [stage for stage in stages if not _is_never(stage.start, max_duration)]
        if _first_factor(stages) is None and all(stage.factor is None for stage in reached):
            raise ConfigError(
                f"{where}.{group} freezes it throughout: set optimizer.lr_{group}=0, which needs no optimizer state"
            )
    trained = [group for group in groups_of(config) if getattr(config.optimizer, f"lr_{group}")]
    if trained and all(_first_factor(groups.get(group, [])) is None for group in trained):
        raise ConfigError(f"{where} freezes {', '.join(trained)} at the start, so nothing would train: leave one out")


def _first_factor(stages: Sequence[StageEntry]) -> float | None:
    """Return the factor of the first batch."""
    factors = [stage.factor for stage in stages if (parse_duration(stage.start) or (1.0, ""))[0] == 0]
    return factors[-1] if factors else 1.0


def _is_never(start: str, max_duration: str | int | None) -> bool:
    begin = parse_duration(start)
    end = parse_duration(f"{max_duration}ep" if isinstance(max_duration, int) else max_duration)
    assert begin is not None
    end = (1.0, "dur") if begin[1] == "dur" else end
    return end is not None and begin[1] == end[1] and begin[0] >= end[0]
