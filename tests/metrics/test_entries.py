"""Metric entries share one source that is computed once; the loss average is the whole set's."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from recipe.metrics.gather import LossAverage, metric_entries
from recipe.schema import LossCounts


class Spread(Metric):
    """Least and greatest of all values; counts how often it was computed."""

    full_state_update = False
    computations = 0

    def __init__(self):
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.values: list[Tensor]

    def update(self, values: Tensor) -> None:
        self.values.append(values)

    def compute(self) -> dict[str, Tensor]:
        Spread.computations += 1
        values = torch.cat(self.values)
        return {"least": values.min(), "greatest": values.max()}


def feed(metrics: dict[str, Metric], *values: float) -> None:
    """As Composer does: every entry is updated with every batch."""
    for metric in metrics.values():
        metric.update(torch.tensor(values))


def results(metrics: dict[str, Metric]) -> dict[str, float]:
    return {name: float(metric.compute()) for name, metric in metrics.items()}


@pytest.fixture
def spread() -> dict[str, Metric]:
    Spread.computations = 0
    return dict(metric_entries(Spread(), ["least", "greatest"]))


def test_the_source_is_updated_and_computed_once(spread: dict[str, Metric]):
    feed(spread, 3.0, 1.0)
    feed(spread, 2.0)
    assert results(spread) == {"least": 1, "greatest": 3}
    assert Spread.computations == 1
    assert len(spread["greatest"].source.values) == 2  # type: ignore[union-attr]


def test_more_data_is_computed_anew(spread: dict[str, Metric]):
    feed(spread, 3.0)
    assert results(spread)["greatest"] == 3
    feed(spread, 5.0)
    assert results(spread) == {"least": 3, "greatest": 5}


def test_reset_forgets(spread: dict[str, Metric]):
    feed(spread, 3.0)
    results(spread)
    for metric in spread.values():
        metric.reset()
    feed(spread, 7.0)
    assert results(spread) == {"least": 7, "greatest": 7}


def test_a_deep_copy_shares_a_source_of_its_own(spread: dict[str, Metric]):
    """Composer copies the dict of metrics."""
    copied = deepcopy(spread)
    feed(copied, 4.0)
    feed(spread, 1.0)
    assert results(copied) == {"least": 4, "greatest": 4}
    assert results(spread) == {"least": 1, "greatest": 1}
    assert copied["least"].source is copied["greatest"].source is not spread["least"].source  # type: ignore[union-attr]


def loss_sums(scale: float) -> dict[str, Tensor]:
    return {name: torch.tensor(scale * (i + 1)) for i, name in enumerate(LossAverage.denominators)}


def loss_counts(scale: float) -> LossCounts:
    return LossCounts(
        teacher_tokens=10 * scale, student_tokens=20 * scale, objects=4 * scale, images=2 * scale, microbatches=1
    )


def test_loss_average_by_hand():
    """Sums over sums, not a mean of means: (1 + 4) / (10 + 30) and so on."""
    metric = LossAverage()
    metric.update(loss_sums(1.0), loss_counts(1))
    metric.update(loss_sums(4.0), loss_counts(3))
    assert {name: float(value) for name, value in metric.compute().items()} == {
        "loss_lm_teacher": pytest.approx(5 * 1 / 40),
        "loss_lm_student": pytest.approx(5 * 2 / 80),
        "loss_bbox": pytest.approx(5 * 3 / 16),
        "loss_giou": pytest.approx(5 * 4 / 16),
        "loss_objectness": pytest.approx(5 * 5 / 8),
        "loss_caption": pytest.approx(5 * 6 / 8),
    }


def test_nothing_counted_is_zero_and_other_terms_are_left_out():
    metric = LossAverage()
    metric.update({**loss_sums(0.0), "loss_bbox_aux": torch.tensor(9.0)}, loss_counts(0))
    assert set(metric.compute()) == set(LossAverage.denominators)
    assert not any(float(value) for value in metric.compute().values())


def test_many_small_losses_keep_their_digits():
    """In float32 none of these hundred would change the sum."""
    metric = LossAverage()
    metric.sums += 1e8
    for _ in range(100):
        metric.update(loss_sums(0.01), loss_counts(1))
    assert float(metric.sums[0]) == pytest.approx(1e8 + 1, abs=1e-5)
