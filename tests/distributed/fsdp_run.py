"""Runs of recipe.train in float64, one after the other: `composer -n N tests/distributed/fsdp_run.py LEGS.json`.

In each, every rank writes OUT/RANK.pt: its share of the loss terms and FLOPs of each step, the scores and texts of each
evaluation, the whole weights at the end.
"""

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Logger, State
from composer.utils import dist
from torch import Tensor

from recipe.algorithms.staged_freezing import plain_name
from recipe.callbacks import table
from recipe.callbacks.measures import joint_model
from recipe.callbacks.throughput import PARTS, step_flops
from recipe.config import (
    GROUPS,
    AnswersConfig,
    EmaConfig,
    EvaluationConfig,
    LoaderConfig,
    OptimizerConfig,
    RecipeConfig,
    SchedulerConfig,
)
from recipe.schema import EvalOutputs
from recipe.train import main
from tests.distributed.fsdp_shim import HYBRID, install
from tests.distributed.one_step import whole, whole_parameters
from tests.launches.launch import leave
from tests.support.float64 import compute_in_float64
from tests.support.staged_cases import ADAPTED_RATES
from tests.support.tiny_cases import ADAPTED, ALL_SWITCHES, make_config


@dataclass(frozen=True)
class Leg:
    """One run.

    Attributes:
        checkpoint: Folder of the tiny language model.
        data: Folder of the split `train`, which is also evaluated on.
        out: Run folder.
        mode: ddp, fsdp1 or fsdp2; hybrid1 or hybrid2 shards over two ranks and has copies on the others.
        steps: To train in all.
        sharded: Checkpoints of a file a rank.
        begin_with: Run folder that is copied first, to go on from; empty: none.
        ema: Whether evaluation uses averages of the head's weights.
        kept: Whether FSDP keeps gathered weights from the forward pass to the backward pass.
        switched: Every ingredient of the head is on.
        adapted: The trunk is frozen below adapters.
        classed: Objects get a probability of each of `CLASSES` instead of a caption.
    """

    checkpoint: str
    data: str
    out: str
    mode: str
    steps: int = 5
    sharded: bool = False
    begin_with: str = ""
    ema: bool = False
    kept: bool = False
    switched: bool = False
    adapted: bool = False
    classed: bool = False


CLASSES = ["a red star", "a red circle", "blue", "a large green triangle"]


class Recorder(Callback):
    """Loss terms and FLOPs of each step; scores and predicted texts of each evaluation."""

    def __init__(self):
        self.losses: list[dict[str, Tensor]] = []
        self.flops: list[dict[str, int]] = []
        self.scores: list[dict[str, float]] = []
        self.texts: list[dict[str, list[str | None]]] = []
        self.shares: list[dict[str, list[dict[str, float]]]] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        """A new step."""
        del logger
        self.losses.append({})
        flops = step_flops(joint_model(state).model, state.batch, frozenset(GROUPS))
        self.flops.append({part: flops.model[part] for part in PARTS})

    def after_loss(self, state: State, logger: Logger) -> None:
        """Composer logs in float32: keep the terms themselves."""
        del logger
        assert isinstance(state.loss, dict)
        step = self.losses[-1]
        for name, value in state.loss.items():
            step[name] = step.get(name, torch.zeros(())) + value.detach()

    def eval_start(self, state: State, logger: Logger) -> None:
        """A new evaluation."""
        del state, logger
        self.texts.append({})
        self.shares.append({})

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """The answer, the captions and the probabilities of classes about each sample."""
        del logger
        assert isinstance(state.outputs, EvalOutputs)
        for prediction in state.outputs.predictions:
            self.texts[-1][prediction.id] = [prediction.answer, *(found.caption for found in prediction.objects)]
            self.shares[-1][prediction.id] = [dict(found.classes) for found in prediction.objects if found.classes]

    def eval_end(self, state: State, logger: Logger) -> None:
        """All scores."""
        del logger
        self.scores.append({name: float(value) for name, value in state.eval_metric_values.items()})


def config_of(leg: Leg) -> RecipeConfig:
    """Return steps of four samples, evaluated after the fourth and the last, saved after the third."""
    version = 1 if leg.mode.endswith("1") else 2
    trainer: dict[str, Any] = {
        "max_duration": f"{leg.steps}ba",
        "eval_interval": "4ba",
        "save_interval": "3ba",
        "device_train_microbatch_size": 1 if dist.get_world_size() > 1 else 2,
        "precision": "fp32",
        "progress_bar": False,
    }
    if leg.mode != "ddp":
        fsdp: dict[str, Any] = {"mixed_precision": "FULL", "state_dict_type": "sharded" if leg.sharded else "full"}
        if leg.kept:
            fsdp |= {"reshard_after_forward": False} if version == 2 else {"sharding_strategy": "SHARD_GRAD_OP"}
        if leg.mode.startswith("hybrid"):
            fsdp |= HYBRID
        trainer["parallelism_config"] = {"fsdp": fsdp}
        if version == 1 and not leg.sharded:
            trainer["save_folder"] = None  # FSDP1 on the CPU ends with SIGSEGV there (torch 2.7)
    stream = {"main": {"local": leg.data, "split": "train"}}
    return replace(
        make_config(
            leg.checkpoint,
            **(ALL_SWITCHES if leg.switched else ADAPTED if leg.adapted else {}),
        ),
        run_folder=leg.out,
        fsdp_version=version,
        train_loader=LoaderConfig(streams=stream, global_batch_size=4, dataset={"num_canonical_nodes": 1}),
        eval_loader=LoaderConfig(streams=stream, global_batch_size=max(2, dist.get_world_size())),
        evaluation=EvaluationConfig(
            score_threshold=0.0,
            max_captions=3,
            answers=AnswersConfig(images=1),
            max_new_tokens=6,
            num_logged_images=1,
            classes=CLASSES if leg.classed else [],
        ),
        optimizer=ADAPTED_RATES
        if leg.adapted
        else OptimizerConfig(lr_vision=1e-3, lr_merger=1e-3, lr_llm=1e-3, lr_adapter=1e-3, lr_detection=1e-3),
        scheduler=SchedulerConfig("constant"),
        ema=EmaConfig(half_life="2ba") if leg.ema else None,
        callbacks={"recorder": {}},
        trainer=trainer,
    )


def run(leg: Leg) -> None:
    """Trains and writes the record."""
    trainer = main(config_of(leg))
    recorder = next(callback for callback in trainer.state.callbacks if isinstance(callback, Recorder))
    with whole_parameters(trainer.state.model):
        weights = {
            plain_name(name): whole(value.detach()).clone() for name, value in trainer.state.model.named_parameters()
        }
    names = ("losses", "flops", "scores", "texts", "shares")
    record = {"weights": weights, **{name: getattr(recorder, name) for name in names}}
    torch.save(record, Path(leg.out, f"{dist.get_global_rank()}.pt"))
    trainer.close()


if __name__ == "__main__":
    dist.initialize_dist("cpu")
    install()
    compute_in_float64()
    table.CALLBACKS = {**table.CALLBACKS, "recorder": Recorder}
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        if dist.get_global_rank() == 0 and entry["begin_with"]:
            shutil.copytree(entry["begin_with"], entry["out"], symlinks=True)
        dist.barrier()
        run(Leg(**entry))
    if dist.get_world_size() > 1:
        leave()
