"""The section `ema` of a yaml, and the place of its algorithm."""

from pathlib import Path

import pytest

from recipe.algorithms.head_ema import HeadEMA
from recipe.algorithms.nan_rollback import NaNRollback
from recipe.algorithms.staged_freezing import StagedFreezing
from recipe.build import build_algorithms
from recipe.config import ConfigError, EmaConfig
from tests.algorithms.test_rollback_config import load


def kinds(folder: Path, *overrides: str) -> list[type]:
    return [type(algorithm) for algorithm in build_algorithms(load(folder, *overrides))]


def test_before_the_guard_which_takes_its_snapshot_after(tmp_path: Path) -> None:
    assert kinds(tmp_path) == [StagedFreezing, NaNRollback]
    assert kinds(tmp_path, "ema={}") == [StagedFreezing, HeadEMA, NaNRollback]


def test_it_is_set_key_by_key(tmp_path: Path) -> None:
    assert load(tmp_path, "ema.half_life=50ba").ema == EmaConfig(half_life="50ba")
    config = load(tmp_path, "ema.smoothing=0.9", "ema.half_life=null", "ema.update_interval=2ba").ema
    assert config == EmaConfig(half_life=None, smoothing=0.9, update_interval="2ba")
    assert config is not None
    assert (HeadEMA(config).smoothing, HeadEMA(config).update_interval) == (0.9, 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ema.smoothing=0.9"], "ema.half_life is 100ba and ema.smoothing is 0.9: set one, and the other to null"),
        (["ema.half_life=null"], "ema.half_life is None and ema.smoothing is None: set one"),
        (["ema.half_life=null", "ema.smoothing=1.0"], "ema.smoothing is 1.0: it must be above 0 and below 1"),
        (["ema.half_life=1ep"], "ema.half_life is '1ep': it must be 1 batch or more"),
        (["ema.update_interval=0ba"], "ema.update_interval is '0ba': it must be 1 batch or more"),
        (["ema.halflife=1ba"], "unknown key ema.halflife.*half_life"),
    ],
)
def test_mistakes(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, *overrides)
