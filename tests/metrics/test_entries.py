"""`Evaluation`: its entries share one source that is computed once; losses are averaged over the whole set."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from metric_cases import make_prediction, make_sample
from torch import Tensor
from torchmetrics import Metric

from recipe.metrics.boxes import box_average_precision
from recipe.metrics.gather import Evaluation, MetricEntry
from recipe.schema import LossCounts, Prediction, Sample

BOX = (0.0, 0.0, 10.0, 10.0)


class Spread:
    """Least and greatest score of all predictions; counts how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, predictions: Sequence[Prediction], samples: Sequence[Sample]) -> dict[str, float]:
        self.calls += 1
        scores = [item.score for prediction in predictions for item in prediction.objects]
        return {"least": min(scores, default=-1.0), "greatest": max(scores, default=-1.0)}


def loss_sums(scale: float) -> dict[str, Tensor]:
    return {name: torch.tensor(scale * (i + 1)) for i, name in enumerate(Evaluation.denominators)}


def loss_counts(scale: float) -> LossCounts:
    return LossCounts(
        teacher_tokens=10 * scale, student_tokens=20 * scale, objects=4 * scale, images=2 * scale, microbatches=1
    )


def feed(metrics: dict[str, Metric], *scores: float) -> None:
    """As Composer does: every entry is updated with every batch."""
    predictions = [make_prediction(str(score), [(BOX, score, "")]) for score in scores]
    samples = [make_sample(str(score), [(BOX, "x")]) for score in scores]
    for metric in metrics.values():
        metric.update(predictions, samples, loss_sums(0.0), loss_counts(0))


def results(metrics: dict[str, Metric]) -> tuple[float, float]:
    least, greatest = (float(metrics[name].compute()) for name in ("least", "greatest"))
    return least, greatest


def source_of(metrics: dict[str, Metric]) -> Evaluation:
    entry = metrics["least"]
    assert isinstance(entry, MetricEntry)
    return entry.source


@pytest.fixture
def spread() -> dict[str, Metric]:
    return Evaluation(Spread()).entries()


def test_the_source_is_updated_and_computed_once(spread: dict[str, Metric]):
    source = source_of(spread)
    assert isinstance(source.scores, Spread)
    asked = source.scores.calls
    feed(spread, 0.75, 0.25)
    feed(spread, 0.5)
    assert results(spread) == (0.25, 0.75)
    assert source.scores.calls == asked + 1
    assert len(source.evaluated) == 3


def test_more_data_is_computed_again(spread: dict[str, Metric]):
    feed(spread, 0.25)
    assert results(spread) == (0.25, 0.25)
    feed(spread, 0.5)
    assert results(spread) == (0.25, 0.5)


def test_reset_forgets(spread: dict[str, Metric]):
    feed(spread, 0.25)
    results(spread)
    for metric in spread.values():
        metric.reset()
    feed(spread, 0.75)
    assert results(spread) == (0.75, 0.75)


def test_a_deep_copy_shares_a_source_of_its_own(spread: dict[str, Metric]):
    """Composer copies the dict of metrics."""
    copied = deepcopy(spread)
    feed(copied, 0.5)
    feed(spread, 0.25)
    assert results(copied) == (0.5, 0.5)
    assert results(spread) == (0.25, 0.25)
    assert source_of(copied) is not source_of(spread)
    assert len({id(entry.source) for entry in copied.values() if isinstance(entry, MetricEntry)}) == 1


def test_nothing_is_lost_on_the_way(spread: dict[str, Metric]):
    """What the scores see is what was added, but for the image's bytes."""
    sample = make_sample("a", [((1 / 3, 0.1, 10, 20.5), "“x”\n")], crowds=[BOX], expression="ein 杯", answers=["[]"])
    prediction = replace(
        make_prediction("a", [((1 / 3, 0.1, 1e-7, 2e5), 1 / 7, "é\u2028y")], [BOX]), answer_is_cut=True
    )
    unparsed = Prediction("b", 7, 8, (), "no json", None)
    source = source_of(spread)
    source.update([prediction], [replace(sample, image=b"bytes")], loss_sums(0.0), loss_counts(0))
    source.update([unparsed], [make_sample("b", [])], loss_sums(0.0), loss_counts(0))
    source.compute()
    found = {item.id: (item, kept) for _, item, kept in source.evaluated}
    assert found == {"a": (prediction, sample), "b": (unparsed, make_sample("b", []))}


def test_samples_of_two_sets_that_look_alike_both_count():
    """Two images without objects, of one size and number: one is rightly left empty, the other is not."""
    far = (80.0, 80.0, 90.0, 90.0)
    predictions = [
        make_prediction("a", [(BOX, 0.5, "")]),
        make_prediction("b", []),
        make_prediction("b", [(far, 1, "")]),
    ]
    samples = [make_sample("a", [(BOX, "x")]), make_sample("b", []), replace(make_sample("b", []), image=b"another")]
    values = []
    for order in (1, -1):
        source = Evaluation(box_average_precision)
        source.update(predictions[::order], samples[::order], loss_sums(0.0), loss_counts(0))
        values.append({name: float(value) for name, value in source.compute().items()})
    assert values[0] == values[1]
    assert values[0]["box_ap50"] == pytest.approx(0.5)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_an_evaluation_without_a_batch_is_refused(spread: dict[str, Metric]):
    with pytest.raises(ValueError, match="before any update"):
        spread["least"].compute()


def losses_of(source: Evaluation) -> dict[str, float]:
    values = source.compute()
    return {name: float(values[name]) for name in Evaluation.denominators}


def nothing(predictions: Sequence[Prediction], samples: Sequence[Sample]) -> dict[str, float]:
    return {}


def test_loss_average_by_hand():
    """Sums over sums, not a mean of means: (1 + 4) / (10 + 30) and so on."""
    source = Evaluation(nothing)
    source.update([], [], loss_sums(1.0), loss_counts(1))
    source.update([], [], loss_sums(4.0), loss_counts(3))
    assert losses_of(source) == {
        "loss_lm_teacher": pytest.approx(5 * 1 / 40),
        "loss_lm_student": pytest.approx(5 * 2 / 80),
        "loss_bbox": pytest.approx(5 * 3 / 16),
        "loss_giou": pytest.approx(5 * 4 / 16),
        "loss_objectness": pytest.approx(5 * 5 / 8),
        "loss_caption": pytest.approx(5 * 6 / 8),
    }


def test_nothing_counted_is_zero_and_other_terms_are_left_out():
    source = Evaluation(nothing)
    source.update([], [], {**loss_sums(0.0), "loss_bbox_aux": torch.tensor(9.0)}, loss_counts(0))
    assert set(source.compute()) == set(Evaluation.denominators)
    assert not any(losses_of(source).values())


def test_many_small_losses_keep_their_digits():
    """In float32 none of these hundred would change the sum."""
    source = Evaluation(nothing)
    source.loss_sums += 1e8
    for _ in range(100):
        source.update([], [], loss_sums(0.01), loss_counts(1))
    assert float(source.loss_sums[0]) == pytest.approx(1e8 + 1, abs=1e-5)
