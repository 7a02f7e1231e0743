"""Train in stages by Composer's Trainer, in one process or several: what each run ends with, on each rank."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from composer import Algorithm, State, Trainer
from composer.core import DataSpec
from composer.utils import dist
from torch import Tensor

from recipe.algorithms.staged_freezing import StagedFreezing, plain_name
from recipe.config import OptimizerConfig, RecipeConfig, SchedulerConfig, StagedFreezingConfig
from recipe.data.loader import get_num_samples_in_batch, get_num_tokens_in_batch
from recipe.joint import JointModel
from recipe.losses.counts import split_batch
from recipe.optim.fsdp import build_parallelism
from recipe.optim.groups import build_optimizer, local
from recipe.optim.schedule import build_curve, build_schedule
from recipe.schema import Batch, Example
from tests.support.tiny_cases import microbatches_of

# This rank's part of every parameter and of its Adam state, by name: weight, step, exp_avg, exp_avg_sq.
Parts = dict[str, dict[str, Tensor]]
# The samples of two ranks in each step of an epoch.
STEPS = [(["one"], ["text"]), (["empty"], ["one"]), (["text"], ["unannotated"]), (["one"], ["empty"])]
RATES = OptimizerConfig(
    lr_vision=1e-3, lr_merger=1e-3, lr_llm=1e-3, lr_adapter=2e-3, lr_detection=2e-3, weight_decay=0.1
)
# With `tiny_cases.ADAPTED`, whose adapters take the place of what is below them.
ADAPTED_RATES = replace(RATES, lr_vision=0.0, lr_llm=0.0, lr_lora_vision=1e-3, lr_lora_llm=1e-3)
FROZEN_FROM_START = [{"from": "0ba", "lr": "frozen"}, {"from": "3ba", "lr": 1.0}]
TWO_STAGES = {group: FROZEN_FROM_START for group in ("llm", "adapter", "detection")}
# Stages of 3, 2, 2 and 1 batches.
MANY_STAGES = {
    **TWO_STAGES,
    "llm": [*FROZEN_FROM_START, {"from": "7ba", "lr": 0.1}],
    "vision": [{"from": "5ba", "lr": "frozen"}, {"from": "7ba", "lr": 0.5}],
}


def adapted(stages: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stages of the trunk as those of its adapters."""
    return {f"lora_{group}" if group in ("vision", "llm") else group: value for group, value in stages.items()}


def make_steps(examples: Mapping[str, Example]) -> list[list[Batch]]:
    """Return the microbatches of this rank in each step of an epoch; one process reads those of both ranks."""
    steps = []
    for shares in STEPS:
        names = shares[dist.get_global_rank()] if dist.get_world_size() > 1 else [*shares[0], *shares[1]]
        steps.append(microbatches_of([examples[name] for name in names], "packed", 2))
    return steps


def config_with(
    stages: dict[str, Any], scheduler: SchedulerConfig | None = None, rates: OptimizerConfig = RATES
) -> RecipeConfig:
    return RecipeConfig(
        optimizer=rates,
        staged_freezing=StagedFreezingConfig(stages),
        scheduler=scheduler or SchedulerConfig("constant"),
        trainer={"max_duration": "2ep"},
    )


def train(
    model: JointModel,
    steps: Sequence[list[Batch]],
    duration: str,
    config: RecipeConfig,
    algorithms: Sequence[Algorithm] | None = None,
    start: Parts | None = None,
    mode: str = "ddp",
    **keywords: Any,
) -> Trainer:
    """Train and return the trainer.

    Args:
        model: At its start.
        steps: Of an epoch.
        duration: Of the run.
        config: Its optimizer, scheduler and stages count.
        algorithms: Default: `StagedFreezing` alone.
        start: What to set parameters and Adam state to before the first step.
        mode: ddp, fsdp1 or fsdp2; one process is not DDP.
        keywords: Of the Trainer.
    """
    parallelism = None
    if mode != "ddp":
        fsdp = {"mixed_precision": "FULL", "state_dict_type": "sharded"}
        parallelism = build_parallelism(model.model, fsdp, None, int(mode.removeprefix("fsdp")))
    trainer = Trainer(
        model=model,
        parallelism_config=parallelism,
        train_dataloader=DataSpec(
            list(steps),
            split_batch=split_batch,
            get_num_samples_in_batch=get_num_samples_in_batch,
            get_num_tokens_in_batch=get_num_tokens_in_batch,
        ),
        optimizers=build_optimizer(model, config.optimizer),
        schedulers=build_curve(config.scheduler),
        algorithms=[StagedFreezing(build_schedule(config.scheduler, config.staged_freezing, config.optimizer))]
        if algorithms is None
        else list(algorithms),
        max_duration=duration,
        device="cpu",
        precision="fp32",
        device_train_microbatch_size=2,
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        seed=1,
        **keywords,
    )
    if start is not None:
        set_parts(trainer, start)
    trainer.fit()
    return trainer


def parts_of(state: State) -> Parts:
    """Return a copy; the Adam state only of what has trained."""
    optimizer = state.optimizers[0]
    parts: Parts = {}
    for name, parameter in state.model.named_parameters():
        found: dict[str, Tensor] = dict(optimizer.state.get(parameter, {}))
        found = found if found and found["step"] > 0 else {}
        parts[plain_name(name)] = {k: local(v).detach().clone() for k, v in {"weight": parameter, **found}.items()}
    return parts


@torch.no_grad()
def set_parts(trainer: Trainer, parts: Parts) -> None:
    optimizer = trainer.state.optimizers[0]
    for name, parameter in trainer.state.model.named_parameters():
        values = {**parts[plain_name(name)]}
        local(parameter).copy_(values.pop("weight"))
        if values:
            optimizer.state[parameter] = {
                "step": values["step"].clone(),
                **{key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")},
            }
            for key in ("exp_avg", "exp_avg_sq"):
                local(optimizer.state[parameter][key]).copy_(values[key])


def differing(found: Parts, expected: Parts) -> list[str]:
    """Return the names of parameters of which any bit of weight or Adam state differs."""
    assert found.keys() == expected.keys()
    return [
        name
        for name, values in expected.items()
        if found[name].keys() != values.keys()
        or not all(torch.equal(found[name][key], value) for key, value in values.items())
    ]


def by_hand(
    model: JointModel,
    other: JointModel,
    steps: Sequence[list[Batch]],
    mode: str = "ddp",
    rates: OptimizerConfig = RATES,
) -> Parts:
    """Train `TWO_STAGES` as two runs without the algorithm: frozen groups' rates 0; then all, from what the first left.

    Args:
        model: For the first run.
        other: For the second.
        steps: Of an epoch.
        mode: Of both.
        rates: Of both, but for what is frozen.
    """
    config = config_with({}, rates=rates)
    first = RecipeConfig(
        optimizer=replace(rates, lr_llm=0.0, lr_lora_llm=0.0, lr_adapter=0.0, lr_detection=0.0),
        scheduler=SchedulerConfig("constant"),
    )
    trainer = train(model, steps, "3ba", first, algorithms=[], mode=mode)
    parts = parts_of(trainer.state)
    trainer.close()
    rest = [*steps, *steps][3:]
    trainer = train(other, rest, "5ba", config, algorithms=[], start=parts, mode=mode)
    parts = parts_of(trainer.state)
    trainer.close()
    return parts
