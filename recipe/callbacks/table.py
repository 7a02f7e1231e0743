"""List and build the callbacks and loggers that a yaml may name; `recipe.config` lists the names too."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer import Callback
from composer.callbacks import (
    LRMonitor,
    MemoryMonitor,
    OOMObserver,
    OptimizerMonitor,
    RuntimeEstimator,
    SpeedMonitor,
    SystemMetricsMonitor,
)
from composer.loggers import LoggerDestination
from composer.utils import dist

from recipe.callbacks.loggers import GuardedJsonLinesLogger, GuardedTensorboardLogger, TextLogger
from recipe.callbacks.measures import GroupMetrics, LossGradients, LossShares
from recipe.callbacks.memory import MemoryBounds
from recipe.callbacks.progress import ProgressLogger
from recipe.callbacks.stoppers import StayingEarlyStopper, StayingThresholdStopper
from recipe.callbacks.throughput import Throughput
from recipe.records import write_whole

WANDB_ID_FILE = "wandb_id.txt"

CALLBACKS: Mapping[str, type[Callback]] = {
    "early_stopper": StayingEarlyStopper,
    "group_metrics": GroupMetrics,
    "loss_gradients": LossGradients,
    "loss_shares": LossShares,
    "lr_monitor": LRMonitor,
    "memory_bounds": MemoryBounds,
    "memory_monitor": MemoryMonitor,
    "oom_observer": OOMObserver,
    "optimizer_monitor": OptimizerMonitor,
    "runtime_estimator": RuntimeEstimator,
    "speed_monitor": SpeedMonitor,
    "system_metrics_monitor": SystemMetricsMonitor,
    "threshold_stopper": StayingThresholdStopper,
    "throughput": Throughput,
}
LOGGERS: Mapping[str, type[LoggerDestination]] = {  # and wandb
    "file": TextLogger,
    "json_lines": GuardedJsonLinesLogger,
    "tensorboard": GuardedTensorboardLogger,
}


def logger_class(name: str) -> type[LoggerDestination]:
    """Return the class of a logger that a yaml may name."""
    if name != "wandb":
        return LOGGERS[name]
    from recipe.upstream.wandb_logger import SafeWandBLogger  # half a second, for those who use it

    return SafeWandBLogger


def build_callbacks(chosen: Mapping[str, Any], run_folder: str) -> list[Callback]:
    """Return the callbacks that a yaml names."""
    defaults = {  # Composer's own is a folder next to the run's
        "oom_observer": {"folder": f"{run_folder}/out_of_memory", "remote_file_name": None, "overwrite": True}
    }
    given = {name: keywords for name, keywords in chosen.items() if keywords is not None}
    return [CALLBACKS[name](**{**defaults.get(name, {}), **keywords}) for name, keywords in given.items()]


def build_loggers(chosen: Mapping[str, Any], run_folder: str, progress: bool = False) -> list[LoggerDestination]:
    """Return the loggers that a yaml names, which write into the run folder unless their keywords say otherwise.

    With `progress` the console shows it too.
    """
    Path(run_folder).mkdir(parents=True, exist_ok=True)
    defaults: dict[str, dict[str, Any]] = {
        "file": {"filename": f"{run_folder}/log-rank{{rank}}.txt"},
        "json_lines": {"path": f"{run_folder}/metrics.jsonl"},
        "tensorboard": {"log_dir": f"{run_folder}/tensorboard"},
        "wandb": {"project": "qwen-detect-recipe"},
    }
    given = {name: {**defaults[name], **keywords} for name, keywords in chosen.items() if keywords is not None}
    if "wandb" in given:  # offline unless the user says otherwise
        init_kwargs = {"dir": run_folder, "mode": os.environ.get("WANDB_MODE", "offline")}
        if given["wandb"].get("rank_zero_only", True):
            init_kwargs |= {"id": _wandb_id(Path(run_folder)), "resume": "allow"}
        given["wandb"]["init_kwargs"] = init_kwargs | (given["wandb"].get("init_kwargs") or {})
    loggers = [logger_class(name)(**keywords) for name, keywords in given.items()]
    for logger in loggers:
        if isinstance(logger, GuardedTensorboardLogger):
            logger.folder_name = Path(run_folder).absolute().name
    return [*loggers, ProgressLogger()] if progress else loggers


def _wandb_id(run_folder: Path) -> str:
    """Return the id of the run folder's one W&B run; made by the first start on rank 0."""
    path = run_folder / WANDB_ID_FILE
    if dist.get_global_rank() == 0 and not path.exists():
        write_whole(path, uuid.uuid4().hex[:8].encode())  # draws from none of the run's random generators
    return path.read_text().strip() if path.exists() else ""
