"""Lets Composer's FSDP paths run in gloo processes on the CPU, with right numbers; install before the Trainer."""

import inspect
from typing import Any

import torch
import torch.distributed.fsdp._fully_shard._fsdp_collectives as collectives
import torch.distributed.fsdp._fully_shard._fsdp_param_group as param_group
from torch import nn

from recipe.joint import JointModel
from recipe.optim import fsdp as parallel

HYBRID = {"data_parallel_shard_degree": 2, "data_parallel_replicate_degree": -1}


def parallelism_of(model: JointModel, mode: str) -> Any:
    """Composer's `parallelism_config` for ddp, fsdp1, fsdp2, or with shards over two ranks each hybrid1, hybrid2."""
    if mode == "ddp":
        return None
    keywords = {"mixed_precision": "FULL", **(HYBRID if mode.startswith("hybrid") else {})}
    return parallel.build_parallelism(model.model, keywords, None, int(mode[-1]))


def install() -> None:
    """Does nothing where there is a GPU.

    Composer 0.32.1 asks CUDA for the device of FSDP1 and of parameters on the meta device. Gloo of torch 2.7 answers
    an averaging reduce-scatter, which FSDP2 asks for, with the sum. With replicas FSDP2 asserts that the device marks
    the end of their all-reduce by an event, of which a CPU has none.
    """
    if torch.cuda.is_available():
        return
    parallel.check_device = lambda: None
    torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    if len(inspect.signature(collectives._get_gradient_divide_factors).parameters) == 4:  # torch 2.6 and 2.7
        collectives._get_gradient_divide_factors = _divide_by_all_ranks  # pyright: ignore[reportAttributeAccessIssue]
    param_group.foreach_reduce = _with_event(collectives.foreach_reduce)  # pyright: ignore[reportPrivateImportUsage]
    nn.Module.to_empty = _to_empty_on_cpu(nn.Module.to_empty)


def _divide_by_all_ranks(group: Any, replicas: Any, dtype: Any, device_type: str = "") -> tuple[float, float]:
    return float(group.size() * (replicas.size() if replicas is not None else 1)), 1.0


def _with_event(foreach_reduce: Any) -> Any:
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        *before, all_reduce_input, all_reduce_event, partial = foreach_reduce(*arguments, **keywords)
        return *before, all_reduce_input, all_reduce_event or object(), partial

    return wrapped


def _to_empty_on_cpu(to_empty: Any) -> Any:
    def wrapped(self: nn.Module, *, device: Any, recurse: bool = True) -> nn.Module:
        return to_empty(self, device="cpu" if "cuda" in str(device) else device, recurse=recurse)

    return wrapped
