"""Training is the same with and without evaluation: weights, losses, random states, modes, data, clock."""

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, Evaluator, Trainer
from composer.callbacks import SpeedMonitor
from composer.core import State
from composer.loggers import InMemoryLogger, Logger
from torch import Tensor
from torch.utils.data import DataLoader

from convert.shapes import iter_samples
from convert.write import write_split
from recipe.callbacks.evaluation_without_traces import EvaluationWithoutTraces
from recipe.callbacks.samples import LogFirstSample
from tests.callbacks.evaluated_run import STEPS, train
from tests.callbacks.test_table import ToyModel
from tests.launches.launch import run_composer

SLEEP = 0.3  # seconds of an evaluation


class RudeEvaluation(Callback):
    """Draws from every generator and takes its time in evaluation, as a metric may."""

    def batch_start(self, state: State, logger: Logger) -> None:
        """One module is frozen in its evaluation mode."""
        model: Any = state.model
        model.model[0].eval()

    def eval_start(self, state: State, logger: Logger) -> None:
        """In evaluation."""
        random.random()
        np.random.rand()
        torch.rand(1)
        time.sleep(SLEEP)


class Model(ToyModel):
    """With an evaluation that needs no samples."""

    def eval_forward(self, batch: dict[str, Any], outputs: Any = None) -> Any:
        return batch["x"]


class Recorder(Callback):
    """What training finds at the end of each batch, when the evaluation of it is done."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """After the evaluation of a batch."""
        numpy_state: Any = np.random.get_state()
        numbers = (random.getstate(), numpy_state[1].tolist(), torch.get_rng_state().tolist())
        modes = [module.training for module in state.model.modules()]
        wanted = [parameter.requires_grad for parameter in state.model.parameters()]
        self.found.append((numbers, modes, wanted, state.batch["x"].tolist(), state.dataloader_label))


def train_toy(eval_interval: str, *callbacks: Callback) -> tuple[list[Any], dict[str, Tensor], InMemoryLogger]:
    torch.manual_seed(0)
    data = [{"x": torch.full((4,), float(index))} for index in range(6)]
    model, recorder, logger = Model(), Recorder(), InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, batch_size=2, shuffle=True),  # pyright: ignore[reportArgumentType]
        eval_dataloader=Evaluator(
            label="eval",
            dataloader=DataLoader([{"x": -1 - item["x"]} for item in data[:2]]),  # pyright: ignore[reportArgumentType]
        ),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.001),
        max_duration="2ep",
        eval_interval=eval_interval,
        callbacks=[*callbacks, RudeEvaluation(), SpeedMonitor(window_size=1, time_unit="seconds"), recorder],
        loggers=[logger],
        progress_bar=False,
        seed=7,
        device="cpu",
    )
    trainer.fit()
    return recorder.found, model.state_dict(), logger


def test_training_finds_what_it_left() -> None:
    expected, plain, _ = train_toy("100ep", EvaluationWithoutTraces())
    found, evaluated, _ = train_toy("1ba", EvaluationWithoutTraces())
    assert found == expected
    assert all(torch.equal(plain[name], evaluated[name]) for name in plain)


def test_composer_alone_leaves_traces() -> None:
    """Of all that is tested: random states, the mode of the frozen module, and the batch."""
    (numbers, modes, wanted, batch, label), *_ = train_toy("100ep")[0]
    (other_numbers, other_modes, other_wanted, other_batch, other_label), *_ = train_toy("1ba")[0]
    assert [mine != other for mine, other in zip(numbers, other_numbers, strict=True)] == [True, True, True]
    assert modes != other_modes
    assert batch != other_batch
    assert (wanted, label) == (other_wanted, other_label)


def test_the_clock_of_training_stands_still() -> None:
    _, _, logger = train_toy("1ba", EvaluationWithoutTraces())
    seconds = {name: logger.data[name][-1][1] for name in ("time/train", "time/val")}
    assert seconds["time/train"] < SLEEP, "six evaluations are in the time of training"
    assert seconds["time/val"] >= 5 * SLEEP  # logged before the last one
    assert min(rate for _, rate in logger.data["throughput/batches_per_sec"]) > 1 / SLEEP


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("data"))
    for split, num_samples, seed in (("train", 20, 1), ("val", 3, 2), ("teachers", 3, 3)):
        write_split(iter_samples(num_samples, seed, image_size=84, max_objects=5), folder, split)
    return folder


class DrawsInEvaluation(LogFirstSample):
    """As a metric or a sampled answer would."""

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        torch.rand(1)


@pytest.mark.slow
def test_the_whole_line_trains_the_same(
    tiny_checkpoint: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipe.build.LogFirstSample", DrawsInEvaluation)
    plain = train(tiny_checkpoint, data, str(tmp_path / "plain"), "100ep")
    evaluated = train(tiny_checkpoint, data, str(tmp_path / "evaluated"), "1ba")
    assert (plain["num_evaluations"], evaluated["num_evaluations"]) == (1, STEPS)
    assert_same(plain, evaluated)

    monkeypatch.setattr("recipe.build.EvaluationWithoutTraces", Callback)
    with_traces = train(tiny_checkpoint, data, str(tmp_path / "traces"), "1ba")
    assert with_traces["losses"][0] == plain["losses"][0]
    assert with_traces["losses"] != plain["losses"]


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_two_ranks_train_the_same(tiny_checkpoint: str, data: str, tmp_path: Path) -> None:
    results = []
    for name, interval in (("plain", "100ep"), ("evaluated", "1ba")):
        folder = tmp_path / name
        folder.mkdir()
        settings = {"checkpoint": tiny_checkpoint, "data": data, "folder": str(folder), "eval_interval": interval}
        (folder / "settings.json").write_text(json.dumps(settings))
        run_composer(2, Path(__file__).with_name("evaluated_run.py"), str(folder / "settings.json"), timeout=400)
        results.append(torch.load(folder / "result.pt"))
    assert_same(*results)


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert len(first["losses"]) == STEPS
    assert first["losses"] == second["losses"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
