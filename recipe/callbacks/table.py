"""The callbacks and loggers that a yaml may name, and the ones every run has."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer import Callback
from composer.callbacks import (
    EarlyStopper,
    LRMonitor,
    MemoryMonitor,
    OOMObserver,
    OptimizerMonitor,
    RuntimeEstimator,
    SpeedMonitor,
    SystemMetricsMonitor,
    ThresholdStopper,
)
from composer.loggers import LoggerDestination
from transformers import PreTrainedTokenizerBase

from recipe.callbacks.evaluation_without_traces import EvaluationWithoutTraces
from recipe.callbacks.group_metrics import GroupMetrics
from recipe.callbacks.log_first_sample import LogFirstSample
from recipe.callbacks.log_predictions import LogPredictions
from recipe.callbacks.loggers import GuardedJsonLinesLogger, GuardedTensorboardLogger, TextLogger
from recipe.callbacks.loss_terms import LossGradients, LossShares
from recipe.callbacks.throughput import Throughput
from recipe.callbacks.training_data import TrainingData
from recipe.checkpoints.save import build_saver
from recipe.checkpoints.sigterm import Preemption
from recipe.config import RecipeConfig
from recipe.schema import Origin
from recipe.upstream.loggers import SafeWandBLogger

CALLBACKS: Mapping[str, type[Callback]] = {
    "early_stopper": EarlyStopper,
    "group_metrics": GroupMetrics,
    "loss_gradients": LossGradients,
    "loss_shares": LossShares,
    "lr_monitor": LRMonitor,
    "memory_monitor": MemoryMonitor,
    "oom_observer": OOMObserver,
    "optimizer_monitor": OptimizerMonitor,
    "runtime_estimator": RuntimeEstimator,
    "speed_monitor": SpeedMonitor,
    "system_metrics_monitor": SystemMetricsMonitor,
    "threshold_stopper": ThresholdStopper,
    "throughput": Throughput,
}
LOGGERS: Mapping[str, type[LoggerDestination]] = {
    "file": TextLogger,
    "json_lines": GuardedJsonLinesLogger,
    "tensorboard": GuardedTensorboardLogger,
    "wandb": SafeWandBLogger,
}


def build_callbacks(config: RecipeConfig, tokenizer: PreTrainedTokenizerBase) -> list[Callback]:
    """What hides evaluation from training, the callbacks the yaml names, those that watch the data and show samples."""
    callbacks: list[Callback] = [EvaluationWithoutTraces()]
    callbacks += [
        CALLBACKS[name](**_callback_keywords(name, keywords, config.run_folder))
        for name, keywords in config.callbacks.items()
        if keywords is not None
    ]
    loader = config.train_loader
    max_tokens = None if loader.packing is None else loader.packing.max_tokens or config.max_seq_len
    num_queries = config.detection_head.num_queries
    callbacks.append(TrainingData(max_tokens, loader.max_bad_samples, config.run_folder, num_queries))
    callbacks.append(LogFirstSample(tokenizer, config.run_folder))
    if config.evaluation.num_logged_images:
        pictures = Path(config.run_folder) / "pictures"
        callbacks.append(
            LogPredictions(config.evaluation.num_logged_images, pictures, config.evaluation.score_threshold)
        )
    return callbacks


def build_savers(config: RecipeConfig, origin: Origin) -> list[Callback]:
    """What saves checkpoints, and saves one on SIGTERM; to be the last callbacks, after all whose state is saved."""
    saver = build_saver(config, origin)
    return [] if saver is None else [saver, Preemption(saver)]


def build_loggers(config: RecipeConfig) -> list[LoggerDestination]:
    """The loggers the yaml names, each writing into the run folder unless its keywords say otherwise."""
    run_folder = Path(config.run_folder)
    run_folder.mkdir(parents=True, exist_ok=True)
    return [
        LOGGERS[name](**_logger_keywords(name, keywords, run_folder))
        for name, keywords in config.loggers.items()
        if keywords is not None
    ]


def _callback_keywords(name: str, keywords: Mapping[str, Any], run_folder: str) -> dict[str, Any]:
    if name == "oom_observer":  # its own default is a folder beside the run's
        return {"folder": f"{run_folder}/out_of_memory", "remote_file_name": None, "overwrite": True, **keywords}
    return dict(keywords)


def _logger_keywords(name: str, keywords: Mapping[str, Any], run_folder: Path) -> dict[str, Any]:
    if name == "file":
        return {"filename": f"{run_folder}/log-rank{{rank}}.txt", **keywords}
    if name == "json_lines":
        return {"path": str(run_folder / "metrics.jsonl"), **keywords}
    if name == "tensorboard":
        return {"log_dir": str(run_folder / "tensorboard"), **keywords}
    # Offline unless the user says otherwise.
    init_kwargs = {"dir": str(run_folder), "mode": os.environ.get("WANDB_MODE", "offline")}
    init_kwargs |= keywords.get("init_kwargs") or {}
    return {"project": "qwen-detect-recipe", **keywords, "init_kwargs": init_kwargs}
