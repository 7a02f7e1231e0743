"""Weight norms and update ratios of groups: against the true difference of the weights, in float64."""

import math
from typing import Any

import pytest
import torch
from composer import Callback, DataSpec, Trainer
from composer.core import State
from composer.loggers import InMemoryLogger, Logger
from composer.models import ComposerModel
from composer.optim import LinearWithWarmupScheduler
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from recipe.callbacks import measures
from recipe.callbacks.measures import GroupMetrics, every_batches, step_square_sums


def make_optimizer(parameters: list[nn.Parameter], weight_decay: float = 0.1) -> AdamW:
    group = {"params": parameters, "lr": 0.02, "weight_decay": weight_decay, "name": "llm"}
    return AdamW([group], lr=0.0, betas=(0.9, 0.95), eps=1e-6)


def step(optimizer: AdamW, skipped: int | None = None) -> float:
    """One step on random gradients; returns the square of what it added to the weights."""
    parameters = optimizer.param_groups[0]["params"]
    for index, parameter in enumerate(parameters):
        parameter.grad = None if index == skipped else torch.randn_like(parameter)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    return sum(float((new - old).square().sum()) for new, old in zip(parameters, before, strict=True))


@pytest.mark.parametrize("piece", [4, 50, 10**6])
def test_norms_of_weights_and_of_what_the_step_added(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(measures, "PIECE", piece)
    torch.manual_seed(0)
    shapes = [(5, 3), (7,), (11, 2), (1,)]
    optimizer = make_optimizer([nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes])
    for number in range(6):
        optimizer.param_groups[0]["lr"] = 0.02 * (number + 1)
        expected = step(optimizer, skipped=number % 4)  # so that the parameters are not equally often stepped
        weights = sum(float(parameter.square().sum()) for parameter in optimizer.param_groups[0]["params"])
        found = step_square_sums(optimizer, optimizer.param_groups[0], 0.02 * (number + 1)).tolist()
        assert found == pytest.approx([weights, expected], rel=1e-10)


def test_bfloat16_moments_are_worked_on_in_float32() -> None:
    torch.manual_seed(0)
    optimizer = make_optimizer([nn.Parameter(torch.randn(64, 64).bfloat16())])
    step(optimizer)
    group = optimizer.param_groups[0]
    parameter = group["params"][0]
    state = optimizer.state[parameter]
    moments = state["exp_avg"].double() / 0.1, (state["exp_avg_sq"].double() / 0.05).sqrt()
    update = 0.02 * (moments[0] / (moments[1] + 1e-6)) + 0.002 * parameter.detach().double()
    expected = float(update.square().sum()) / (1 - 0.002) ** 2
    weights = float(parameter.detach().double().square().sum())
    assert step_square_sums(optimizer, group, 0.02).tolist() == pytest.approx([weights, expected], rel=1e-5)


def test_nothing_stepped_is_zero() -> None:
    optimizer = make_optimizer([nn.Parameter(torch.ones(3))])
    assert step_square_sums(optimizer, optimizer.param_groups[0], 0.02).tolist() == pytest.approx([3, 0])


@pytest.mark.parametrize("interval", ["1ep", "0ba", "10sp"])
def test_interval_is_in_batches(interval: str) -> None:
    assert every_batches("10ba") == 10
    with pytest.raises(ValueError, match="10ba"):
        every_batches(interval)


class ToyModel(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def forward(self, batch: Tensor) -> Tensor:
        return self.model(batch)

    def loss(self, outputs: Tensor, batch: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return outputs.square().mean()


class Truth(Callback):
    """The true norms of each step, from copies; skips the third batch as the rollback would."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.weights: dict[str, list[float]] = {}
        self.ratios: dict[str, list[float]] = {}

    @staticmethod
    def group_weights(state: State) -> dict[str, Tensor]:
        assert isinstance(state.model, ToyModel)
        first, last = state.model.model[0], state.model.model[2]
        return {
            "llm": torch.cat([p.detach().flatten().clone() for p in first.parameters()]),
            "detection": torch.cat([p.detach().flatten().clone() for p in last.parameters()]),
        }

    def batch_start(self, state: State, logger: Logger) -> None:
        self.before = self.group_weights(state)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == 2:
            for parameter in state.model.parameters():
                parameter.grad = None

    def batch_end(self, state: State, logger: Logger) -> None:
        for name, weights in self.group_weights(state).items():
            self.weights.setdefault(name, []).append(float(weights.norm()))
            self.ratios.setdefault(name, []).append(float((weights - self.before[name]).norm() / weights.norm()))


def fit(optimizer: Any, model: ToyModel, *callbacks: Callback) -> InMemoryLogger:
    memory = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec([torch.randn(8, 4, dtype=torch.float64) for _ in range(6)]),
        optimizers=optimizer,
        schedulers=LinearWithWarmupScheduler(t_warmup="3ba"),
        max_duration="6ba",
        device_train_microbatch_size=8,
        callbacks=list(callbacks),
        loggers=[memory],
        progress_bar=False,
        device="cpu",
    )
    trainer.fit()
    trainer.close()
    return memory


def test_in_a_trainer_whose_rate_moves() -> None:
    """Decayed and not decayed parameters of a group, warm-up, a skipped batch, every second batch looked at."""
    model, truth = ToyModel(), Truth()
    first, last = model.model[0], model.model[2]
    rates = {"lr": 0.03, "weight_decay": 0.1}
    optimizer = AdamW(
        [
            {"params": [first.weight], **rates, "name": "llm"},
            {"params": [last.weight], **rates, "name": "detection"},
            {"params": [first.bias], **rates, "weight_decay": 0.0, "name": "llm"},
            {"params": [last.bias], **rates, "weight_decay": 0.0, "name": "detection"},
        ]
    )
    logged = fit(optimizer, model, GroupMetrics("1ba"), truth).data
    for name in ("llm", "detection"):
        assert [value for _, value in logged[f"weight_norm/{name}"]] == pytest.approx(truth.weights[name], rel=1e-12)
        ratios = [value for _, value in logged[f"update_ratio/{name}"]]
        assert ratios == pytest.approx(truth.ratios[name], rel=1e-10)
        assert ratios[2] == 0 and all(ratio > 0 for ratio in ratios[3:]) and not any(map(math.isnan, ratios))


def test_looks_only_every_interval() -> None:
    model = ToyModel()
    groups = [{"params": list(model.parameters()), "name": "llm"}]
    logged = fit(AdamW(groups), model, GroupMetrics("4ba")).data
    assert [time.batch.value for time, _ in logged["update_ratio/llm"]] == [4]


def test_another_optimizer_is_refused() -> None:
    model = ToyModel()
    with pytest.raises(ValueError, match="AdamW"):
        fit(SGD(model.parameters(), lr=0.1), model, GroupMetrics())
