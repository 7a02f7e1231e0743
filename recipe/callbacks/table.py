"""The callbacks and loggers that a yaml may name; `recipe.config` lists the names next to their keys."""

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

from recipe.callbacks.group_metrics import GroupMetrics
from recipe.callbacks.loggers import GuardedJsonLinesLogger, GuardedTensorboardLogger, TextLogger
from recipe.callbacks.loss_terms import LossGradients, LossShares
from recipe.callbacks.progress import ProgressLogger
from recipe.callbacks.throughput import Throughput
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


def build_callbacks(chosen: Mapping[str, Any], run_folder: str) -> list[Callback]:
    """Return the callbacks that a yaml names."""
    defaults = {  # Composer's own is a folder next to the run's
        "oom_observer": {"folder": f"{run_folder}/out_of_memory", "remote_file_name": None, "overwrite": True}
    }
    return [
        CALLBACKS[name](**{**defaults.get(name, {}), **keywords})
        for name, keywords in chosen.items()
        if keywords is not None
    ]


def build_loggers(chosen: Mapping[str, Any], run_folder: str, progress: bool = False) -> list[LoggerDestination]:
    """Return the loggers that a yaml names, each writing into the run folder unless its keywords say otherwise.

    Args:
        chosen: {name: keywords}; None switches one off.
        run_folder: Is created.
        progress: Show progress on the console too.
    """
    Path(run_folder).mkdir(parents=True, exist_ok=True)
    loggers = [
        LOGGERS[name](**_logger_keywords(name, keywords, run_folder))
        for name, keywords in chosen.items()
        if keywords is not None
    ]
    return [*loggers, ProgressLogger()] if progress else loggers


def _logger_keywords(name: str, keywords: Mapping[str, Any], run_folder: str) -> dict[str, Any]:
    if name == "file":
        return {"filename": f"{run_folder}/log-rank{{rank}}.txt", **keywords}
    if name == "json_lines":
        return {"path": f"{run_folder}/metrics.jsonl", **keywords}
    if name == "tensorboard":
        return {"log_dir": f"{run_folder}/tensorboard", **keywords}
    # Offline unless the user says otherwise.
    init_kwargs = {"dir": run_folder, "mode": os.environ.get("WANDB_MODE", "offline")}
    init_kwargs |= keywords.get("init_kwargs") or {}
    return {"project": "qwen-detect-recipe", **keywords, "init_kwargs": init_kwargs}
