"""Stages in one process: what moves, what rests, what is checked, logged and kept, and what it costs in memory."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Algorithm, Callback, Event, Logger, State, Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerModel
from torch import Tensor, nn

from recipe.algorithms.staged_freezing import StagedFreezing, bit_sums, check_membership
from recipe.config import OptimizerConfig, RecipeConfig, SchedulerConfig
from recipe.optim.schedule import build_curve, build_schedule
from tests.support.staged_cases import (
    MANY_STAGES,
    TWO_STAGES,
    Parts,
    config_with,
    differing,
    parts_of,
)

COSINE = SchedulerConfig("cosine", "2ba", 0.1)
SEQUENCE = ("vision", "merger", "llm", "adapter", "detection")


class Toy(ComposerModel):
    """A linear layer a group, one after the other; detection has a loss of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.ModuleDict({group: nn.Linear(3, 3) for group in SEQUENCE})

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        for group in SEQUENCE[:3]:
            batch = self.model[group](batch)
        return batch, self.model["detection"](self.model["adapter"](batch))

    def loss(self, outputs: tuple[Tensor, Tensor], batch: Tensor) -> Tensor:
        return outputs[0].square().mean() + (outputs[1] - 1).square().mean()


class Recorder(Callback):
    """Every part after every batch; parts[0] is before the first."""

    def __init__(self):
        self.parts: list[Parts] = []
        self.saved_rates: list[dict[str, float]] = []

    def fit_start(self, state: State, logger: Logger) -> None:
        self.parts.append(parts_of(state))

    def batch_end(self, state: State, logger: Logger) -> None:
        self.parts.append(parts_of(state))
        self.saved_rates.append({group["name"]: group["lr"] for group in state.optimizers[0].param_groups})


class Tamper(Algorithm):
    """Spoils a step after its backward pass."""

    def __init__(self, batch: int, action: Callable[[nn.Module], None]):
        self.batch = batch
        self.action = action

    def match(self, event: Event, state: State) -> bool:
        return event is Event.AFTER_TRAIN_BATCH and int(state.timestamp.batch) == self.batch

    @torch.no_grad()
    def apply(self, event: Event, state: State, logger: Logger) -> None:
        self.action(state.model)


def toy_optimizer(model: Toy, rates: OptimizerConfig) -> torch.optim.AdamW:
    groups = [
        {"params": list(layer.parameters()), "lr": getattr(rates, f"lr_{name}"), "name": name}
        for name, layer in model.model.items()
    ]
    return torch.optim.AdamW([group for group in groups if group["lr"]], weight_decay=0.1)


def train_toy(config: RecipeConfig, duration: str = "2ep", model: Toy | None = None, **keywords: Any) -> Trainer:
    """Epochs of four batches."""
    model = model or Toy()
    generator = torch.Generator().manual_seed(5)
    algorithms = [
        StagedFreezing(build_schedule(config.scheduler, config.staged_freezing, config.optimizer)),
        *keywords.pop("algorithms", []),
    ]
    trainer = Trainer(
        model=model,
        train_dataloader=[torch.randn(2, 3, generator=generator) for _ in range(4)],
        optimizers=toy_optimizer(model, config.optimizer),
        schedulers=build_curve(config.scheduler),
        algorithms=algorithms,
        max_duration=duration,
        device="cpu",
        device_train_microbatch_size=2,
        progress_bar=False,
        seed=1,
        **keywords,
    )
    trainer.fit()
    return trainer


@dataclass
class Run:
    """A run of `MANY_STAGES` under a cosine, a checkpoint after every batch."""

    recorder: Recorder
    logged: dict[str, list[float]]
    messages: list[str]
    folder: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("toy")
    recorder, memory = Recorder(), InMemoryLogger()
    with messages_of("recipe") as messages:
        train_toy(
            config_with(MANY_STAGES, COSINE),
            callbacks=[recorder],
            loggers=[memory],
            save_folder=str(folder),
            save_interval="1ba",
            save_filename="ba{batch}.pt",
        )
    logged = {name: [value for _, value in points] for name, points in memory.data.items()}
    return Run(recorder, logged, list(messages), folder)


@contextmanager
def messages_of(name: str) -> Iterator[list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


def part(parts: Parts, group: str, key: str = "weight") -> Tensor:
    return parts[f"model.{group}.weight"][key]


def steps_of(parts: Parts, group: str) -> int:
    """Of Adam; 0 where the group never trained."""
    return int(parts[f"model.{group}.weight"].get("step", 0))


def test_the_rate_of_every_batch_is_that_of_its_own_time(run: Run):
    """Two batches of warm-up from 0, then half a cosine over six to a tenth; times the factor of the stage."""
    cosine = [1, 0.9397, 0.775, 0.55, 0.325, 0.1603]
    expected = {
        "merger": [0.0, 0.5, *cosine],
        "llm": [0, 0, 0, *cosine[1:5], 0.1 * cosine[5]],
        "vision": [0, 0.5, *cosine[:3], 0, 0, 0.5 * cosine[5]],
    }
    for group, factors in expected.items():
        assert run.logged[f"lr/{group}"] == pytest.approx([1e-3 * factor for factor in factors], rel=1e-3)
    # What a checkpoint or another callback reads after the step is that step's rate.
    for batch, rates in enumerate(run.recorder.saved_rates):
        assert {group: run.logged[f"lr/{group}"][batch] for group in SEQUENCE} == rates


def test_frozen_groups_rest_and_then_start_fresh(run: Run):
    parts = run.recorder.parts
    for group in ("llm", "adapter", "detection"):
        assert all(torch.equal(part(parts[batch], group), part(parts[0], group)) for batch in (1, 2, 3))
        assert [steps_of(parts[batch], group) for batch in (0, 3, 4, 8)] == [0, 0, 1, 5]
    assert steps_of(parts[3], "merger") == 3


def test_a_group_frozen_in_between_keeps_its_adam_state(run: Run):
    parts = run.recorder.parts
    for key in ("weight", "exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(part(parts[5], "vision", key), part(parts[7], "vision", key))
        assert not torch.equal(part(parts[7], "vision", key), part(parts[8], "vision", key))
    assert [steps_of(parts[batch], "vision") for batch in (5, 6, 7, 8)] == [5, 5, 5, 6]


def test_every_stage_is_told(run: Run):
    tables = [message for message in run.messages if message.startswith("stage from batch")]
    assert [table.split(" on:")[0] for table in tables] == [
        f"stage from batch {batch} (epoch {batch // 4})" for batch in (0, 3, 5, 7)
    ]
    rows = [line.split() for line in tables[3].splitlines()[2:]]
    assert rows[0] == ["vision", "12", "12", "0.5", "8.01e-05"] and rows[2][:4] == ["llm", "12", "12", "0.1"]
    assert tables[0].splitlines()[4].split() == ["llm", "12", "0", "frozen", "0"]


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 6, 7])
def test_resumed_in_and_between_stages_is_bit_for_bit(run: Run, batch: int):
    recorder = Recorder()
    train_toy(config_with(MANY_STAGES, COSINE), load_path=str(run.folder / f"ba{batch}.pt"), callbacks=[recorder])
    assert differing(recorder.parts[0], run.recorder.parts[batch]) == []
    assert differing(recorder.parts[-1], run.recorder.parts[8]) == []


def test_a_changed_rate_is_told_and_the_checkpoints_holds(run: Run):
    config = config_with(MANY_STAGES, COSINE)
    config = replace(config, optimizer=replace(config.optimizer, lr_llm=5e-3))
    memory = InMemoryLogger()
    with messages_of("recipe") as messages:
        train_toy(config, load_path=str(run.folder / "ba4.pt"), loggers=[memory])
    told = [message for message in messages if "in the checkpoint" in message]
    assert len(told) == 1 and "group llm: lr is 0.005 in the configuration but 0.001 in the checkpoint" in told[0]
    assert [value for _, value in memory.data["lr/llm"]] == run.logged["lr/llm"][4:]


def test_betas_are_the_same_as_a_list(run: Run, tmp_path: Path):
    """As whole checkpoints of FSDP2 hold them."""
    checkpoint = torch.load(run.folder / "ba4.pt", weights_only=False)
    (optimizer,) = checkpoint["state"]["optimizers"].values()
    for group in optimizer["param_groups"]:
        group["betas"] = list(group["betas"])
    torch.save(checkpoint, tmp_path / "ba4.pt")
    with messages_of("recipe") as messages:
        train_toy(config_with(MANY_STAGES, COSINE), load_path=str(tmp_path / "ba4.pt"))
    assert not [message for message in messages if "in the checkpoint" in message]


def test_unchanged_rates_are_not_told(run: Run):
    with messages_of("recipe") as messages:
        train_toy(config_with(MANY_STAGES, COSINE), load_path=str(run.folder / "ba7.pt"))
    assert not [message for message in messages if "in the checkpoint" in message]


def test_cut_base_rates_hold():
    """As a rollback cuts them."""

    def cut(model: nn.Module) -> None:
        (scheduler,) = trainers[0].schedulers
        scheduler.base_lrs = [rate / 2 for rate in scheduler.base_lrs]

    trainers: list[State] = []

    class Grabber(Callback):
        def fit_start(self, state: State, logger: Logger) -> None:
            trainers.append(state)

    memory = InMemoryLogger()
    train_toy(config_with({}), "1ep", algorithms=[Tamper(1, cut)], callbacks=[Grabber()], loggers=[memory])
    assert [value for _, value in memory.data["lr/llm"]] == [1e-3, 1e-3, 5e-4, 5e-4]


def test_a_changed_frozen_parameter_stops_the_run():
    def change(model: nn.Module) -> None:
        model.get_parameter("model.llm.bias")[1] += 1e-7

    with pytest.raises(RuntimeError, match=r"batch 3 changed model\.llm\.bias, though the group llm is frozen"):
        train_toy(config_with({"llm": [{"from": "3ba", "lr": "frozen"}]}), algorithms=[Tamper(3, change)])


def test_a_group_that_does_not_move_stops_the_run():
    config = config_with({"llm": [{"from": "1ba", "lr": 1e-12}]})
    with pytest.raises(RuntimeError, match=r"batch 1 moved no parameter of the group llm.* 1e-15 is lost in the round"):
        train_toy(config)


def test_a_parameter_without_gradient_is_named():
    class Spare(Toy):
        def __init__(self):
            super().__init__()
            self.model["llm"].spare = nn.Parameter(torch.zeros(2))

    with messages_of("recipe") as messages:
        train_toy(config_with({}), model=Spare())
    assert "batch 0 did not move 1 parameters of the group llm: model.llm.spare" in "\n".join(messages)


@pytest.mark.parametrize(("gradient", "is_reported"), [(0.0, False), (1e-12, False), (1e-7, True)])
def test_a_gradient_of_zeros_or_their_rounding_is_not_reported(gradient: float, is_reported: bool):
    """A layer that starts at zero passes none on in the first step; a rate of 1e-7 moves no weight of 100."""

    class Behind(Toy):
        def __init__(self):
            super().__init__()
            self.behind = nn.Parameter(torch.full((2,), 100.0))
            self.model["llm"].register_parameter("behind", self.behind)

        def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
            language, detection = super().forward(batch)
            return language + gradient * self.behind.sum(), detection

    config = config_with({"llm": [{"from": "0ba", "lr": 1e-4}]})
    config = replace(config, optimizer=replace(config.optimizer, weight_decay=0.0))
    with messages_of("recipe") as messages:
        train_toy(config, model=Behind())
    assert ("did not move 1 parameters of the group llm: behind" in "\n".join(messages)) == is_reported


@pytest.mark.parametrize("spoiled", [None, float("nan")])
def test_a_step_that_was_none_is_not_judged_but_the_next(spoiled: float | None):
    def spoil(model: nn.Module) -> None:
        for parameter in model.parameters():
            if spoiled is None:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad *= spoiled

    def change(model: nn.Module) -> None:
        model.get_parameter("model.llm.weight")[0, 0] += 1

    algorithms = [Tamper(0, spoil), Tamper(1, change)]
    stages = {"llm": [{"from": "0ba", "lr": "frozen"}, {"from": "3ba", "lr": 1}]}
    with pytest.raises(RuntimeError, match=r"batch 1 changed model\.llm\.weight"):
        train_toy(config_with(stages), algorithms=algorithms)


def test_a_group_without_gradient_waits_for_its_check():
    """As the head's in a batch without images: what the first batch could not show, the second does."""

    def blank(model: nn.Module) -> None:
        for name in ("weight", "bias"):
            gradient = model.get_parameter(f"model.adapter.{name}").grad
            assert gradient is not None
            gradient.zero_()

    config = config_with({"adapter": [{"from": "0ba", "lr": 1e-12}]})
    with pytest.raises(RuntimeError, match="batch 1 moved no parameter of the group adapter"):
        train_toy(config, algorithms=[Tamper(0, blank)])


def test_a_rate_of_zero_waits_for_its_check():
    """In the first batch of a warm-up nothing can move."""
    train_toy(config_with({}, SchedulerConfig("constant", "2ba")), "3ba")


def test_all_frozen_stops_the_run():
    stages = {group: [{"from": "2ba", "lr": "frozen"}] for group in SEQUENCE}
    with pytest.raises(RuntimeError, match=r"all groups are frozen from batch 2 on"):
        train_toy(config_with(stages))


def test_every_trainable_parameter_is_in_one_optimizer_group():
    model = Toy()
    optimizer = toy_optimizer(model, OptimizerConfig(lr_llm=0))
    with pytest.raises(RuntimeError, match=r"model\.llm\.weight is trainable, but 0 optimizer groups hold it"):
        check_membership(model, optimizer)
    model.model["llm"].requires_grad_(False)
    check_membership(model, optimizer)
    optimizer.param_groups[1]["params"].append(model.model["vision"].weight)
    with pytest.raises(RuntimeError, match=r"model\.vision\.weight is trainable, but 2 optimizer groups hold it"):
        check_membership(model, optimizer)


def test_a_parameter_that_the_optimizer_lacks_stops_the_run():
    config = replace(config_with({}), optimizer=OptimizerConfig(lr_llm=0))
    with pytest.raises(RuntimeError, match=r"model\.llm\.weight is trainable, but 0 optimizer groups hold it"):
        train_toy(config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bit_sums_see_the_smallest_change(dtype: torch.dtype):
    tensors = [torch.randn(3, 5).to(dtype), torch.zeros(0, dtype=dtype), torch.randn(7).to(dtype).t()]
    before = bit_sums(tensors)
    tensors[2][3] = torch.nextafter(tensors[2][3], torch.tensor(9.0, dtype=dtype))
    assert (bit_sums(tensors) - before).tolist()[:2] == [0, 0] and bit_sums(tensors)[2] != before[2]


def test_ddp_is_told_only_where_a_group_is_ever_frozen():
    def told(stages: dict[str, Any]) -> bool:
        config = config_with(stages)
        return StagedFreezing(
            build_schedule(config.scheduler, config.staged_freezing, config.optimizer)
        ).find_unused_parameters

    assert told(TWO_STAGES) and not told({"llm": [{"from": "1ep", "lr": 0.1}]})
