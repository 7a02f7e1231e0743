"""Watchers by hand: what sets each off, and what must not."""

import json
from math import inf

import pytest

from recipe.algorithms.watch import (
    Action,
    Reading,
    Watch,
    consecutive,
    finite_values,
    is_explosion,
    nan_ratio,
    robust_z_score,
)
from recipe.config import ExplosionWatchConfig, NaNRollbackConfig, RatioWatchConfig, RunWatchConfig, SpikeWatchConfig

GOOD, BAD = Reading(True, 1.0, 1.0), Reading(False, float("nan"), float("inf"))
SILENT = NaNRollbackConfig(
    consecutive_nan=None, nan_ratio=None, consecutive_zero_losses=None, gradient_explosion=None, loss_spike=None
)


def watch(**watchers: object) -> Watch:
    """One with these watchers alone."""
    return Watch(NaNRollbackConfig(**{**vars(SILENT), **watchers}))


def test_robust_z_score_by_hand():
    """Median 3; deviations 2 1 0 1 97, their median 1; so a deviation of 1.4826."""
    past = [1.0, 2.0, 3.0, 4.0, 100.0]
    assert robust_z_score(3.0, past) == 0
    assert robust_z_score(3 + 2 * 1.4826, past) == pytest.approx(2)
    assert robust_z_score(3 - 1.4826, past) == pytest.approx(-1)


def test_robust_z_score_of_a_constant_past():
    """The deviation is then a thousandth of the median; of zeros, any other value is infinitely far."""
    assert robust_z_score(2.0, [2.0] * 5) == 0
    assert robust_z_score(2.02, [2.0] * 5) == pytest.approx(10)
    assert robust_z_score(-2.0 + 0.02, [-2.0]) == pytest.approx(10)
    assert robust_z_score(0.0, [0.0] * 3) == 0
    assert robust_z_score(1e-9, [0.0] * 3) == inf
    assert robust_z_score(-1.0, [0.0] * 3) == 0


def test_consecutive():
    assert consecutive([], lambda _: True) == 0
    assert consecutive([BAD, GOOD, BAD, BAD], lambda item: not item.is_finite) == 2
    assert consecutive([BAD, GOOD], lambda item: not item.is_finite) == 0
    assert consecutive([BAD, BAD], lambda item: not item.is_finite) == 2


def test_nan_ratio_counts_what_is_not_known_as_finite():
    assert nan_ratio([BAD], 4) == 0.25
    assert nan_ratio([BAD, BAD, GOOD, GOOD, BAD, GOOD], 4) == 0.25


def test_finite_values_of_a_short_past():
    """Half the window must be known."""
    assert finite_values([GOOD] * 2, 5, lambda item: item.loss) == []
    assert finite_values([GOOD] * 3, 5, lambda item: item.loss) == [1.0] * 3
    assert finite_values([GOOD] * 9, 5, lambda item: item.loss) == [1.0] * 5
    assert finite_values([GOOD, GOOD, BAD, BAD, BAD], 5, lambda item: item.loss) == []


def test_explosion_is_above_a_multiple_of_the_median():
    assert is_explosion(20.1, [1.0, 2.0, 50.0], 10)
    assert not is_explosion(20.0, [1.0, 2.0, 50.0], 10)
    assert not is_explosion(1.0, [0.0, 0.0, 5.0], 10)
    assert not is_explosion(1e9, [], 10)


@pytest.mark.parametrize(
    ("name", "config", "readings", "expected"),
    [
        ("consecutive_nan", RunWatchConfig("rollback", 2), [BAD, GOOD, BAD, BAD, BAD], [0, 0, 0, 1, 1]),
        ("nan_ratio", RatioWatchConfig("skip", 4, 0.5), [BAD, GOOD, BAD, GOOD, GOOD, BAD], [0, 0, 1, 0, 0, 1]),
        (
            "consecutive_zero_losses",
            RunWatchConfig("log", 2),
            [Reading(True, 0.0, 0.0), Reading(True, 0.0, 0.0), GOOD, Reading(True, 0.0, 0.0)],
            [0, 1, 0, 0],
        ),
        (
            "gradient_explosion",
            ExplosionWatchConfig("skip", 4, 10),
            [Reading(True, 1.0, 50.0), GOOD, Reading(True, 1.0, 999.0), BAD, GOOD, GOOD, Reading(True, 1.0, 10.1)],
            [0, 0, 1, 0, 0, 0, 1],
        ),
        (
            "loss_spike",
            SpikeWatchConfig("skip", 4, 10),
            [Reading(True, 9.0, 1.0), GOOD, GOOD, Reading(True, 1.011, 1.0), Reading(True, -9.0, 1.0), BAD],
            [0, 0, 0, 1, 0, 0],
        ),
    ],
)
def test_each_watcher(name: str, config: object, readings: list[Reading], expected: list[int]):
    """Alone; a batch that is not finite is no explosion and no spike."""
    made = watch(**{name: config})
    action = Action[config.action.upper()]  # pyright: ignore[reportAttributeAccessIssue]
    assert [made.alarms(reading) for reading in readings] == [{name: action} if alarm else {} for alarm in expected]


def test_the_history_survives_a_checkpoint():
    """Through JSON, with what is not finite; and no more is kept than the largest window."""
    made = watch(nan_ratio=RatioWatchConfig("skip", 3, 0.5), consecutive_nan=RunWatchConfig("skip", 2))
    for reading in (BAD, GOOD, GOOD, GOOD, BAD):
        made.alarms(reading)
    assert len(made.readings) == 3
    again = Watch(made.config)
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert repr(again.readings) == repr(made.readings)
    assert again.alarms(BAD) == made.alarms(BAD) == {"nan_ratio": Action.SKIP, "consecutive_nan": Action.SKIP}
