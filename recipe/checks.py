"""Check what needs other libraries, the machine or the data, before anything is built and after `recipe.rules`."""

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from composer import Callback, Trainer
from streaming import Stream, StreamingDataset
from torch.utils.data import DataLoader
from transformers.utils.hub import cached_file

from recipe.callbacks.cache_frozen import parse_size
from recipe.callbacks.memory import MemoryBounds
from recipe.callbacks.retention import RETENTION_SCORES
from recipe.callbacks.table import CALLBACKS, logger_class
from recipe.config import (
    DATA_CLASSES,
    ConfigError,
    LoaderConfig,
    RecipeConfig,
    is_base_below_adapters,
    lora_parts,
    nearest,
    trained_trunk,
)
from recipe.data.words import Vocabulary
from recipe.families import LORA_TARGETS, family_named
from recipe.joint import all_scores
from recipe.metrics.boxes import category_average_precision
from recipe.metrics.gather import LANGUAGE_LOSSES, Evaluation
from recipe.metrics.scorers import Meteor15, MeteorLite
from recipe.models.lora import check_peft, read_base
from recipe.models.nf4 import check_bitsandbytes
from recipe.optim.fsdp import FSDP_CONFIGS
from recipe.records import INDEX_FILE, RECORDS_FILE, parse_index, read_records
from recipe.rules import check_stream, check_whole
from recipe.schema import Sample
from recipe.upstream.owned_keywords import OWNED_BY_DATALOADER, OWNED_BY_DATASET, OWNED_BY_FSDP, OWNED_BY_TRAINER
from recipe.upstream.trainer_section import TrainerView, view_trainer

_SOCKET = "/pymp-12345678/listener-12345678"  # of multiprocessing, below the temporary folder
_MOST_OF_SOCKET = 107  # bytes of a socket's path, on Linux


def check_without_head(config: RecipeConfig) -> None:
    """Raise ConfigError if `detection_head` is null and nothing would train, or a key needs the head."""
    if config.detection_head is not None:
        return
    if not trained_trunk(config):
        raise ConfigError(
            "detection_head is null and optimizer.lr_vision, lr_merger and lr_llm are 0, so nothing would train: set "
            "one above 0"
        )
    if not (config.loss.weight_lm_student or config.loss.weight_lm_teacher):
        raise ConfigError(
            "detection_head is null and loss.weight_lm_student and weight_lm_teacher are 0, so nothing would train: "
            "set one above 0"
        )
    for where, value in (("ema", config.ema), ("callbacks.loss_gradients", config.callbacks.get("loss_gradients"))):
        if value is not None:
            raise ConfigError(f"{where} is about the detection head, but detection_head is null: set {where}=null")


def check_libraries(config: RecipeConfig) -> None:
    """Raise ConfigError if another library's keyword does not fit the signature that it is passed to."""
    check_without_head(config)
    for where, loader in (("train_loader", config.train_loader), ("eval_loader", config.eval_loader)):
        for name, keywords in loader.streams.items():
            check_keywords(f"{where}.streams.{name}", keywords, Stream, {})
        check_keywords(f"{where}.dataset", loader.dataset, StreamingDataset, OWNED_BY_DATASET)
        check_keywords(f"{where}.dataloader", loader.dataloader, DataLoader, OWNED_BY_DATALOADER)
    if config.teachers.stream is not None:
        check_keywords("teachers.stream", config.teachers.stream, Stream, {})
    if config.evaluation.retention is not None:
        where, keywords = "evaluation.retention.stream", config.evaluation.retention.stream
        check_stream(where, keywords)
        check_whole(where, keywords)
        check_keywords(where, keywords, Stream, {})
    check_keywords("trainer", config.trainer, Trainer, OWNED_BY_TRAINER)
    for where, chosen, class_of in (
        ("callbacks", config.callbacks, CALLBACKS.__getitem__),
        ("loggers", config.loggers, logger_class),
    ):
        for name, keywords in chosen.items():
            if keywords is not None:
                check_keywords(f"{where}.{name}", keywords, class_of(name), {})
    MemoryBounds(**(config.callbacks.get("memory_bounds") or {}))
    check_metrics(config)
    check_adapters(config)
    check_nf4(config)
    check_moments(config)
    check_cache(config)
    check_augmentation(config)
    names = [entry.name for entry in fields(FSDP_CONFIGS[config.fsdp_version]) if not entry.name.startswith("_")]
    allowed = [name for name in names if name not in OWNED_BY_FSDP]
    for key in view_trainer(config).fsdp or {}:
        if key not in allowed:
            raise ConfigError(
                f"unknown key trainer.parallelism_config.fsdp.{key} with fsdp_version {config.fsdp_version}: "
                f"{nearest(key, allowed)}"
            )


def check_adapters(config: RecipeConfig) -> None:
    """Raise ConfigError if peft is missing, a base weight would train too, or a target cannot have an adapter."""
    parts = lora_parts(config)
    if parts:
        check_peft()
    for part, section in parts.items():
        rate, allowed = getattr(config.optimizer, f"lr_{part}"), LORA_TARGETS[part]
        if rate:
            raise ConfigError(
                f"lora.{part} is set, but optimizer.lr_{part} is {rate:g}: set optimizer.lr_{part}=0, which freezes "
                f"the weights below the adapters; optimizer.lr_lora_{part} is the adapters' own"
            )
        if section.targets is not None and not section.targets:
            raise ConfigError(f"lora.{part}.targets is empty: give some of {', '.join(allowed)}, or null for all")
        for target in section.targets or ():
            if target in ("embed_tokens", "lm_head"):
                raise ConfigError(
                    f"lora.{part}.targets holds {target}: losses and captions read that matrix itself, and merged into "
                    f"one that is tied an adapter counts twice; leave it out: one of {', '.join(allowed)}"
                )
            if target not in allowed:
                raise ConfigError(f"lora.{part}.targets holds {target!r}: {nearest(target, allowed)}")


def check_nf4(config: RecipeConfig) -> None:
    """Raise ConfigError if `model.frozen_dtype` is nf4, but bitsandbytes is missing or no layer can be stored in it."""
    if config.model.frozen_dtype != "nf4":
        return
    check_bitsandbytes("model.frozen_dtype nf4", "set model.frozen_dtype=bfloat16")
    if config.optimizer.lr_llm:
        raise ConfigError(
            f"model.frozen_dtype is nf4, but optimizer.lr_llm is {config.optimizer.lr_llm:g}, so nothing of the "
            "language model is frozen throughout: set optimizer.lr_llm=0 (lora.llm={} lets adapters learn instead), or "
            "model.frozen_dtype=bfloat16"
        )
    if view_trainer(config).is_sharded:
        raise ConfigError(
            "model.frozen_dtype nf4 with trainer.parallelism_config.fsdp, whose units hold weights of one dtype: set "
            "trainer.parallelism_config=null, or model.frozen_dtype=same"
        )


def check_moments(config: RecipeConfig) -> None:
    """Raise ConfigError if `optimizer.moments` is 8bit, but bitsandbytes is missing or cannot train this model."""
    if config.optimizer.moments != "8bit":
        return
    check_bitsandbytes("optimizer.moments 8bit", "set optimizer.moments=full")
    if view_trainer(config).is_sharded:
        raise ConfigError(
            "optimizer.moments 8bit with trainer.parallelism_config.fsdp, which cannot shard the scales of blocks: set "
            "optimizer.moments=full, or trainer.parallelism_config=null"
        )
    if config.model.dtype == "float64":
        raise ConfigError(
            "optimizer.moments 8bit with model.dtype float64, which its steps would round to float32: set "
            "optimizer.moments=full or model.dtype=float32"
        )


def check_cache(config: RecipeConfig) -> None:
    """Raise ConfigError if `cache_frozen` is set, but what the head reads of the trunk is not always the same."""
    if config.cache_frozen is None:
        return
    if parse_size(config.cache_frozen.size_limit) is None:
        raise ConfigError(
            f"cache_frozen.size_limit is {config.cache_frozen.size_limit!r}: give a size such as 500mb, 50gb or 2tb"
        )
    if learning := trained_trunk(config):
        raise ConfigError(
            "cache_frozen needs a trunk that never learns: set "
            + " ".join(f"optimizer.lr_{group}=0" for group in learning)
            + ", or cache_frozen=null"
        )
    teachers = config.teachers
    if teachers.num_teachers and teachers.teacher_ratio:
        raise ConfigError(
            f"cache_frozen with teachers.num_teachers {teachers.num_teachers}: an image has other teachers in every "
            "epoch, so nothing would be read again; set teachers.num_teachers=0 or cache_frozen=null"
        )
    if config.prompt.student_answer:
        raise ConfigError(
            "cache_frozen with prompt.student_answer true: the loss of answers needs the language model in every step; "
            "set prompt.student_answer=null or cache_frozen=null"
        )
    if config.train_loader.augment is not None:
        raise ConfigError(
            "cache_frozen with train_loader.augment: an image looks different in every epoch, so nothing would be read "
            "again; set train_loader.augment=null or cache_frozen=null"
        )
    if view_trainer(config).is_sharded:
        raise ConfigError(
            "cache_frozen with trainer.parallelism_config.fsdp: ranks that share weights must all run or all read; set "
            "trainer.parallelism_config=null, as a frozen trunk that is read needs no FSDP, or cache_frozen=null"
        )


def check_augmentation(config: RecipeConfig) -> None:
    """Raise ConfigError if `train_loader.augment` changes nothing, or a flip would make the prompt untrue."""
    augment, where = config.train_loader.augment, "train_loader.augment"
    if augment is None:
        return
    chosen = {name: getattr(augment, name) for name in ("horizontal_flip", "crop", "scale_jitter", "colour")}
    if not any(value is not None and value != 0 for value in chosen.values()):
        raise ConfigError(f"{where} changes nothing: set {', '.join(chosen)} or one of them, or {where}=null")
    if augment.crop is not None and not augment.crop.ratio[0] <= 1 <= augment.crop.ratio[1]:
        raise ConfigError(f"{where}.crop.ratio is {augment.crop.ratio}: 1 must be between both, such as [0.75, 1.33]")
    if augment.teachers and not config.teachers.num_teachers:
        raise ConfigError(f"{where}.teachers is true, but teachers.num_teachers is 0: leave it out")
    vocabulary, prompt = Vocabulary(augment.languages, augment.words), config.prompt
    texts = {"system": [prompt.system], "detect": [prompt.detect], "candidate_phrases": prompt.candidate_phrases}
    for key, phrases in texts.items():
        flipped = [vocabulary.mirrored(phrase) for phrase in phrases]
        if augment.horizontal_flip and set(flipped) != set(phrases):  # candidates may exchange their places
            phrase = next(text for text, other in zip(phrases, flipped, strict=True) if other not in phrases)
            raise ConfigError(
                f"{where}.horizontal_flip would make prompt.{key} untrue ({phrase[:60]!r}): set "
                f"{where}.horizontal_flip=0, or change the prompt"
            )


def check_retention(config: RecipeConfig) -> None:
    """Raise ConfigError if `evaluation.retention` is set, but a training has no base model to compare with."""
    if config.evaluation.retention is None or is_base_below_adapters(config):
        return
    moved = [group for group in trained_trunk(config) if not group.startswith("lora_")]
    if not moved:
        raise ConfigError(
            "evaluation.retention measures how the text path moves, but no group of the trunk has a learning rate, so "
            "it stays the base's: set evaluation.retention=null"
        )
    raise ConfigError(
        f"evaluation.retention needs the base model, but training changes its weights ({', '.join(moved)}): set "
        f"{' '.join(f'optimizer.lr_{group}=0' for group in moved)} and let adapters learn (lora.llm={{}}); or set "
        "evaluation.retention=null here and give it to recipe/eval.py, which reads the base model too"
    )


def check_metrics(config: RecipeConfig) -> None:
    """Raise ConfigError if `save_best` or a stopper names a metric that no evaluation measures."""
    evaluation, head = config.evaluation, config.detection_head
    num_queries = None if head is None else head.num_queries
    names = [*(LANGUAGE_LOSSES if head is None else Evaluation.denominators)]
    for scorer in (MeteorLite(), Meteor15()):  # the ranks have yet to agree on one
        answered = evaluation.answers is not None
        names += all_scores([], [], num_queries, evaluation.score_threshold, scorer, answered)
    names += [] if evaluation.retention is None else RETENTION_SCORES
    by_category = [] if head is None else [*category_average_precision([], [])]
    if evaluation.every_class or evaluation.classes:
        names += by_category
    asked = {"save_best.metric": (config.save_best.metric, "eval/")}
    for name, keywords in config.callbacks.items():
        if name.endswith("_stopper") and keywords is not None:
            asked[f"callbacks.{name}.monitor"] = (keywords.get("monitor"), "")
    for key, (metric, prefix) in asked.items():
        if str(metric).removeprefix(prefix) in set(by_category) - set(names):
            raise ConfigError(
                f"{key} is {metric!r}, which only the last evaluation of a run measures, as it needs the captions of "
                "all objects: set evaluation.every_class=true, or choose another, such as "
                f"{prefix}densecap_map_boxes"
            )
        if metric is not None and str(metric).removeprefix(prefix) not in names:
            near = nearest(str(metric).rpartition("/")[2], names)
            raise ConfigError(
                f"{key} is {metric!r}, which no evaluation measures: {near.replace('mean ', f'mean {prefix}')}"
            )


def check_keywords(
    where: str, keywords: Mapping[str, Any], function: Callable[..., Any], owned: Mapping[str, str]
) -> None:
    """Raise ConfigError if a keyword of section `where` is unknown to `function`, or required and missing.

    `owned` are the keywords that the recipe passes itself.
    """
    parameters = dict(inspect.signature(function).parameters)
    if isinstance(function, type) and function.__init__ is Callback.__init__:
        parameters = {}  # Composer's base class accepts any keyword
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in keywords:
        if key not in parameters and not takes_any:
            names = [name for name in parameters if name not in owned]
            raise ConfigError(f"unknown key {where}.{key}: {nearest(key, names) if names else 'it takes none'}")
    for name, parameter in parameters.items():
        is_named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if is_named and parameter.default is parameter.empty and name not in keywords and name not in owned:
            raise ConfigError(f"missing {where}.{name}: {getattr(function, '__name__', function)} needs it")


def check_machine(config: RecipeConfig, loaders: Sequence[str] = ("train_loader", "eval_loader")) -> None:
    """Raise ConfigError if this machine lacks a device or the data of `loaders`, with every reason and its remedy."""
    problems = _device_problems(view_trainer(config)) + _model_problems(config)
    if config.val_fraction is not None:
        loaders = ("train_loader",)  # what is evaluated comes from there
    with_classes = ("train_loader",) if config.evaluation.classes == DATA_CLASSES else ()
    for where in dict.fromkeys((*loaders, *with_classes)):
        loader: LoaderConfig = getattr(config, where)
        problems += _worker_problems(where, loader)
        for name, keywords in loader.streams.items():
            problems += _folder_problems(f"{where}.streams.{name}", keywords)
    if config.teachers.num_teachers and config.teachers.stream is not None:
        problems += _folder_problems("teachers.stream", config.teachers.stream)
    if config.evaluation.retention is not None:
        problems += _folder_problems("evaluation.retention.stream", config.evaluation.retention.stream)
    if "train_loader" in loaders and not problems:
        problems += _lesson_problems(config)
    if problems:
        header = [] if len(problems) == 1 else [f"{len(problems)} settings do not fit this machine:"]
        raise ConfigError("\n  ".join([*header, *problems]))


def _worker_problems(where: str, loader: LoaderConfig) -> list[str]:
    """Name a temporary folder whose path is too long: workers pass batches through sockets below it.

    torch 2.7, Python 3.11: the worker prints "AF_UNIX path too long", and the rank waits for its batch indefinitely.
    """
    folder, most = gettempdir(), _MOST_OF_SOCKET - len(_SOCKET)
    if not loader.dataloader.get("num_workers") or len(os.fsencode(folder)) <= most:
        return []
    return [
        f"{where}.dataloader.num_workers: workers need a temporary folder whose path has at most {most} bytes, unlike "
        f"{folder}: set the environment's TMPDIR to a shorter one, or num_workers=0"
    ]


def _device_problems(trainer: TrainerView) -> list[str]:
    has_gpu = torch.cuda.is_available()
    problems = []
    if trainer.device == "gpu" and not has_gpu:
        problems.append("trainer.device is gpu, but no GPU is found: set trainer.device=cpu, or check the driver")
    if not has_gpu or trainer.device == "cpu":
        why = f"needs a GPU, but {'trainer.device is cpu' if has_gpu else 'none is found'}"
        if (trainer.precision or "").startswith("amp_"):
            problems.append(f"trainer.precision {trainer.precision} {why}: set trainer.precision=fp32")
        # On the CPU gloo sums the gradients that FSDP2 asks it to average (torch 2.7).
        if trainer.is_sharded:
            problems.append(f"trainer.parallelism_config.fsdp {why}: set trainer.parallelism_config=null")
    elif trainer.precision is None:
        problems.append("missing trainer.precision: Composer would take amp_fp16 on a GPU; set amp_bf16, or fp32")
    return problems


def _model_problems(config: RecipeConfig) -> list[str]:
    name = config.model.pretrained_model_name_or_path
    if (base := read_base(name)) is not None:
        return [
            f"model.pretrained_model_name_or_path={name} holds adapters only: give their base model, {base}, and "
            f"load_path={name} to start from them"
        ]
    try:
        found: Any = cached_file(name, "config.json")
    except (OSError, ValueError) as error:  # ValueError: a name that the hub does not allow either
        return [
            f"model.pretrained_model_name_or_path is {name!r}, but neither a folder nor the hub has it: give a "
            f"checkpoint folder or a name on the hub ({str(error).splitlines()[0]})"
        ]
    try:
        family = family_named(json.loads(Path(found).read_text(encoding="utf-8")).get("model_type"), name)
    except ConfigError as error:
        return [str(error)]
    except ValueError as error:
        return [f"model.pretrained_model_name_or_path={name!r} has a broken config.json ({error}): copy it again"]
    return [
        f"lora.{part}.targets holds {target!r}, which {family.title} does not have: {nearest(target, allowed)}"
        for part, section in lora_parts(config).items()
        for allowed in [family.lora_targets[part]]
        for target in section.targets or ()
        if target not in allowed
    ]


def _folder_problems(where: str, keywords: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the folder of a stream without `remote`; the loader checks what is fetched."""
    if keywords.get("remote") is not None:
        return []
    folder = Path(keywords["local"], keywords.get("split") or "")
    if (folder / INDEX_FILE).is_file():
        return []
    splits = sorted(path.parent.name for path in Path(keywords["local"]).glob(f"*/{INDEX_FILE}"))
    split = keywords.get("split")
    if split and splits and not folder.is_dir():
        return [f"{where}.split is {split!r}, which {keywords['local']} lacks: {nearest(split, splits)}"]
    what = f"has no {INDEX_FILE}" if folder.is_dir() else "does not exist"
    return [f"{where}.local: {folder} {what}: convert a data set into it first (see convert/), or give another folder"]


def _lesson_problems(config: RecipeConfig) -> list[str]:
    """Return whether no sample of the training set teaches anything; the first one that does ends the search."""
    num_samples = 0
    for keywords in config.train_loader.streams.values():
        folder = Path(keywords.get("local") or "", keywords.get("split") or "")
        if keywords.get("remote") is not None or not (folder / RECORDS_FILE).is_file():
            return []  # not known yet
        try:
            for sample in read_records(folder / RECORDS_FILE, parse_index(folder / INDEX_FILE)):
                if _teaches(sample, config):
                    return []
                num_samples += 1
        except ValueError:  # the loader names the damage
            return []
    return [
        f"train_loader.streams: none of the {num_samples} samples teaches anything with this prompt and these loss "
        "weights: convert records with objects, or with messages that hold an answer"
    ]


def _teaches(sample: Sample, config: RecipeConfig) -> bool:
    loss, is_annotated = config.loss, any(view.objects is not None for view in sample.per_image())
    trains_head = is_annotated and config.detection_head is not None
    if trains_head and max(loss.weight_bbox, loss.weight_giou, loss.weight_objectness, loss.weight_caption) > 0:
        return True
    if not trained_trunk(config):
        return False  # texts teach the trunk alone
    if sample.messages is not None:
        return loss.weight_lm_student > 0 and any(message.get("role") == "assistant" for message in sample.messages)
    if is_annotated and config.prompt.student_answer is not False and loss.weight_lm_student > 0:
        return True
    return config.teachers.num_teachers > 0 and loss.weight_lm_teacher > 0 and sample.has_image
