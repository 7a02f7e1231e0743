"""Build what a run consists of, from its configuration: model, data, algorithms, callbacks.

`recipe.load` builds the network. After `configure` and `checks`, only these two modules and the entry points see the
whole configuration; all others take their section. Values found on the way (caption length, base model's folder) are
arguments; the configuration itself never changes.
"""

import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from composer import Algorithm, Callback, DataSpec
from composer.utils import dist, get_device, reproducibility
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from recipe.algorithms.head_ema import HeadEMA
from recipe.algorithms.nan_rollback import NaNRollback
from recipe.algorithms.staged_freezing import StagedFreezing
from recipe.callbacks.cache_frozen import CacheFrozen
from recipe.callbacks.curves import CURVES_FILE, DrawCurves
from recipe.callbacks.evaluation_data import EvaluationData
from recipe.callbacks.evaluation_parts import EvaluationParts
from recipe.callbacks.evaluation_without_traces import EvaluationWithoutTraces
from recipe.callbacks.retention import Retention
from recipe.callbacks.samples import LogFirstSample, LogPredictions
from recipe.callbacks.summary import Summary
from recipe.callbacks.table import build_callbacks
from recipe.callbacks.training_data import TrainingData
from recipe.checkpoints.base import base_weights, leave_out
from recipe.checkpoints.check import Origin
from recipe.checkpoints.resume import HOLDS_BASE, WEIGHTS_FROM
from recipe.checkpoints.save import CheckpointSaver
from recipe.checkpoints.sigterm import Preemption
from recipe.checkpoints.weights import is_export, trained_caption_length
from recipe.config import DATA_CLASSES, ConfigError, RecipeConfig, is_base_below_adapters, trained_trunk
from recipe.data.class_list import read_classes
from recipe.data.evaluation import EvalSamples
from recipe.data.image import image_spec
from recipe.data.lengths import read_longest_caption
from recipe.data.loader import build_eval_loader, build_train_loader, device_batch_size
from recipe.data.split import evaluation_loader
from recipe.data.teachers import TeacherPool
from recipe.joint import EvaluationScope, JointModel
from recipe.load import build_encoder, build_network, fill_head, fill_whole, load_base, refuse_in_nf4
from recipe.losses.counts import split_batch
from recipe.metrics.gather import normalized_caption
from recipe.models.attention import describe_attention
from recipe.models.vlm import VisionLanguageModel
from recipe.optim.schedule import Schedule, build_schedule, trunk_learns
from recipe.prediction.classes import class_trie
from recipe.upstream.agreement import DIST_TIMEOUT, from_rank_0
from recipe.upstream.cpu_model import read_cpu_model
from recipe.upstream.shared_memory import clean_dead_shared_memory
from recipe.upstream.storage import open_streams
from recipe.upstream.trainer_section import view_trainer

log = logging.getLogger(__name__)


def prepare_process(config: RecipeConfig) -> None:
    """Join the other ranks, remove what killed runs left in shared memory, and seed the random states."""
    dist.initialize_dist(get_device(), view_trainer(config).dist_timeout or DIST_TIMEOUT)
    if dist.get_local_rank() == 0:
        clean_dead_shared_memory()
    read_cpu_model()
    reproducibility.seed_all(config.seed)


def caption_length(config: RecipeConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return `max_caption_tokens`; if it is null, that of the head to start from, else the data's; called by all ranks.

    None without a head.

    Evaluation captions count too: one that is too long would stop the first evaluation.

    Raises:
        ConfigError: The data has longer captions than the head to start from writes.
        ValueError: A stream cannot be opened, or has no records.
    """
    if config.caption_decoder.max_caption_tokens is not None or config.detection_head is None:
        return config.caption_decoder.max_caption_tokens
    loaders = (config.train_loader, *([config.eval_loader] if config.val_fraction is None else []))
    streams = [stream for loader in loaders for stream in open_streams(loader.streams)]
    longest = max(read_longest_caption(streams, tokenizer), 2)
    start, trained = config.load_path or head_to_start_from(config), None
    with suppress(ValueError):  # its run's configuration is not found
        trained = trained_caption_length(config.caption_decoder, start)
    if trained is None:
        log.info("caption_decoder.max_caption_tokens: %d, the longest caption of the data", longest)
        return longest
    if longest > trained:
        raise ConfigError(
            f"the data has captions of up to {longest} tokens, but {start} writes at most {trained} "
            "(caption_decoder.max_caption_tokens): shorten them, or begin with a new head: leave load_path out and set "
            "detection_head.pretrained=false"
        )
    return trained


def class_names(config: RecipeConfig) -> list[str]:
    """Return the names for `evaluation.classes`, those of the training set if it is `data`; called by all ranks.

    Of names that differ in case or outer blanks alone the first is kept, as a class is found by either.

    Raises:
        ConfigError: There are too many to be classes.
        ValueError: A stream cannot be opened, or its classes are not known.
    """
    if config.evaluation.classes != DATA_CLASSES:
        return config.evaluation.classes
    forms: dict[str, str] = {}
    for name in read_classes(open_streams(config.train_loader.streams)):
        forms.setdefault(normalized_caption(name), name)
    names = list(forms.values())
    log.info("evaluation.classes: the %d of the training set, such as %s", len(names), ", ".join(names[:5]))
    return names


def head_to_start_from(config: RecipeConfig) -> str | None:
    """Return the folder of the base model if it is an export and its head is wanted, else None."""
    base, head = config.model.pretrained_model_name_or_path, config.detection_head
    return base if head is not None and head.pretrained and is_export(base) else None


def build_model(config: RecipeConfig, processor: Any, max_caption_tokens: int | None = None) -> JointModel:
    """Return the joint model with the language model's weights, the head's if the base is an export, and averages.

    `max_caption_tokens` defaults to the configuration's.
    """
    names = class_names(config)  # before the weights: it may be refused
    # What `load_path` names is filled in before the model is sharded, and may have more digits than the file.
    vlm = load_base(config, as_stored=view_trainer(config).is_sharded and config.load_path is None)
    log.info("attention: %s", describe_attention(config.model.attn_implementation))
    network = build_network(config, vlm, image_spec(processor.image_processor, config.image), max_caption_tokens)
    base = head_to_start_from(config)
    if base is not None:
        try:
            fill_head(network, Path(base))
        except ValueError as error:
            raise ConfigError(f"{error}, or set detection_head.pretrained=false to begin with a new head") from error
        log.info("the head starts from %s: detection_head.pretrained", base)
    if config.ema is not None:
        network.add_average()
    classes = class_trie(names, processor.tokenizer, network)
    return JointModel(network, processor.tokenizer, config.loss, config.evaluation, config.prompt, classes)


def take_weights(
    model: JointModel, start: Mapping[str, Any], config: RecipeConfig, origin: Origin
) -> tuple[dict[str, Any], Origin]:
    """Load what Composer cannot, before the model is sharded, and leave the base's weights out of checkpoints.

    Weights that the run does not train but that come from where it starts stay in its checkpoints.

    Args:
        model: Of `build_model`.
        start: From `recipe.checkpoints.resume`.
        config: Of the run.
        origin: From `describe`.

    Returns:
        What is left of the Trainer's `load_*` keywords, and what the run's checkpoints say of their origin.

    Raises:
        ConfigError: The frozen weights are stored in nf4, and where the run starts from has its own.
    """
    start = dict(start)
    holds_base = start.pop(HOLDS_BASE, False)
    if (path := start.pop(WEIGHTS_FROM, None)) is not None:
        holds_base = fill_whole(model.model, path, config)
    if holds_base and (origin.base is not None or path is None):
        refuse_in_nf4(config, str(config.load_path))
    if holds_base and origin.base is not None:
        log.info("checkpoints hold the frozen weights too, as the one that the run starts from does")
        origin = replace(origin, base=None)
    if origin.base is None:
        return start, origin
    leave_out(model, base_weights(model.model, config), origin.base)
    return start, origin


def build_train_data(config: RecipeConfig, processor: Any, model: JointModel, teachers: TeacherPool | None) -> DataSpec:
    """Return the training loader; see `recipe.data.loader.build_train_loader`."""
    view, loader, answers = view_trainer(config), config.train_loader, answer_schedule(config)
    asked = (processor, model.model, config.image, config.prompt, config.max_seq_len)
    return build_train_loader(
        loader,
        build_encoder(*asked, with_content=config.cache_frozen is not None),
        teachers,
        config.seed,
        view.microbatch_size or device_batch_size(loader),
        partial(split_batch, equally_many=view.is_sharded),
        config.val_fraction,
        answers_at_start=answers is None or trunk_learns(answers, None),
        answers_ever=answers is None or bool(answers.trunk),
    )


def build_eval_data(config: RecipeConfig, processor: Any, model: JointModel, teachers: TeacherPool | None) -> DataSpec:
    """Return the evaluation loader; see `recipe.data.loader.build_eval_loader`."""
    encoder = build_encoder(processor, model.model, config.image, config.prompt, config.max_seq_len, keep_image=True)
    return build_eval_loader(evaluation_loader(config), encoder, teachers, config.seed, config.val_fraction)


def build_algorithms(config: RecipeConfig) -> list[Algorithm]:
    """Return staged freezing with learning rates, the weight average if `ema` is set, and the guard that also clips.

    Composer calls the last one first after the backward pass, and last at the end of a batch.
    """
    return [
        StagedFreezing(build_schedule(config.scheduler, config.staged_freezing, config.optimizer)),
        *([] if config.ema is None else [HeadEMA(config.ema)]),
        NaNRollback(config.nan_rollback, config.optimizer.clip_norm, config.run_folder),
    ]


def answer_schedule(config: RecipeConfig) -> Schedule | None:
    """Return the schedule that decides in which epochs training reads answers; None: in all."""
    if config.prompt.student_answer is True:
        return None
    schedule = build_schedule(config.scheduler, config.staged_freezing, config.optimizer)
    return replace(schedule, trunk=trained_trunk(config))


def build_retention(config: RecipeConfig, processor: Any, model: JointModel) -> Retention | None:
    """Return the callback of `evaluation.retention`, None without; all ranks must call it.

    If more than adapters learns, it gets the base model, read again: for `eval.py`.

    Raises:
        ConfigError: No sample that it reads has an answer, or one cannot be used.
    """
    retention = config.evaluation.retention
    if retention is None:
        return None
    where, loader = "evaluation.retention", replace(config.eval_loader, streams={"retention": retention.stream})
    encoder = build_encoder(processor, model.model, config.image, config.prompt, config.max_seq_len)
    spec = build_eval_loader(loader, encoder, None, config.seed, max_samples=retention.max_samples, where=where)
    assert isinstance(spec.dataloader, DataLoader)
    samples = spec.dataloader.dataset
    assert isinstance(samples, EvalSamples)
    if not from_rank_0(samples.has_answers):
        raise ConfigError(f"{where}.stream: none of its {len(samples)} samples has an answer: convert chats that do")
    base = None
    if not is_base_below_adapters(config):
        normalizer, attention = model.model.vlm.normalizer, config.model.attn_implementation
        base = VisionLanguageModel(load_base(config), normalizer, attention).eval().requires_grad_(False)
    return Retention(spec, model.scope, loader.max_bad_samples, base)


def build_run_callbacks(config: RecipeConfig, saver: CheckpointSaver | None) -> list[Callback]:
    """Return the callbacks that save a training, end it when the machine asks, and say what it does and did."""
    view = view_trainer(config)
    schedule = answer_schedule(config) or build_schedule(config.scheduler, config.staged_freezing, config.optimizer)
    interval = view.keywords.get("eval_interval", 1)
    savers = [] if saver is None else [saver, Preemption(saver)]
    return [*savers, Summary(config.run_folder, view.save_folder, interval, config.scheduler, schedule)]


def build_all_callbacks(
    config: RecipeConfig,
    tokenizer: PreTrainedTokenizerBase,
    scope: EvaluationScope | None = None,
    last_answered: int | None = None,
    retention: Retention | None = None,
) -> list[Callback]:
    """Return the yaml's callbacks and those that isolate and bound evaluation, watch the data and show samples.

    `scope` is the model's, `last_answered` of `put_answered_first`, of a training run, `retention` of
    `build_retention`.
    """
    scope = scope or EvaluationScope()
    loader, evaluation = config.train_loader, config.evaluation
    max_tokens = None if loader.packing is None else loader.packing.max_tokens or config.max_seq_len
    num_queries = sys.maxsize if config.detection_head is None else config.detection_head.num_queries
    callbacks: list[Callback] = [
        EvaluationWithoutTraces(),
        *([] if retention is None else [retention]),
        EvaluationParts(
            scope,
            evaluation.score_threshold,
            last_answered,
            evaluation.every_class,
            bool(evaluation.classes),
            config.save_best.metric,
        ),
        *build_callbacks(config.callbacks, config.run_folder),
        TrainingData(max_tokens, loader.max_bad_samples, config.run_folder, num_queries, answer_schedule(config)),
        EvaluationData(config.eval_loader.max_bad_samples),
        LogFirstSample(tokenizer, config.run_folder),
        *([] if config.cache_frozen is None else [CacheFrozen(config.cache_frozen)]),
    ]
    metrics = config.loggers.get("json_lines")  # keywords; null: switched off
    if metrics is not None:
        path = metrics.get("path", f"{config.run_folder}/metrics.jsonl")
        callbacks.append(DrawCurves(path, Path(config.run_folder, CURVES_FILE)))
    if evaluation.num_logged_images:
        folder = Path(config.run_folder) / "images"
        callbacks.append(LogPredictions(evaluation.num_logged_images, folder, evaluation.score_threshold, scope))
    return callbacks
