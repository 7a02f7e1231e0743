"""The section `nan_rollback` of a yaml: what may be switched off, and what is refused in one clear line."""

from pathlib import Path

import pytest
import yaml

from recipe.algorithms.nan_rollback import NaNRollback
from recipe.build import build_algorithms
from recipe.config import ConfigError, RecipeConfig
from recipe.configure import load_config
from recipe.rules import check_config

LOADER = {"streams": {"main": {"local": "data"}}, "global_batch_size": 8}
MINIMAL = {
    "run_folder": "runs/test",
    "model": {"pretrained_model_name_or_path": "tiny"},
    "train_loader": LOADER,
    "eval_loader": LOADER,
    "trainer": {"max_duration": "2ep"},
}


def load(folder: Path, *overrides: str) -> RecipeConfig:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    config = load_config(path.as_posix(), overrides)
    check_config(config)
    return config


def test_the_guard_is_always_on_and_last(tmp_path: Path):
    """Also without clipping, and with every watcher off."""
    off = [f"nan_rollback.{name}=null" for name in ("nan_ratio", "consecutive_nan", "loss_spike", "gradient_explosion")]
    guard = build_algorithms(load(tmp_path, "optimizer.clip_norm=null", *off))[-1]
    assert isinstance(guard, NaNRollback)
    assert guard.clip_norm is None and guard.config.nan_ratio is None


def test_a_watcher_is_set_key_by_key(tmp_path: Path):
    config = load(tmp_path, "nan_rollback.loss_spike.action=skip", "nan_rollback.detect_anomaly.start=7ba").nan_rollback
    assert config.loss_spike and (config.loss_spike.action, config.loss_spike.window) == ("skip", 100)
    assert config.detect_anomaly and (config.detect_anomaly.start, config.detect_anomaly.batches) == ("7ba", 5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nan_rollback.snapshot_interval=1ep", "nan_rollback.snapshot_interval is '1ep'.*such as 50ba"),
        ("nan_rollback.snapshot_interval=0ba", "nan_rollback.snapshot_interval is '0ba'"),
        ("nan_rollback.detect_anomaly.start=1ep", "nan_rollback.detect_anomaly.start is '1ep'"),
        ("nan_rollback.nan_ratio.action=stop", "nan_rollback.nan_ratio.action is 'stop'.*log, skip, rollback"),
        ("nan_rollback.loss_spike.window=0", "nan_rollback.loss_spike.window is 0"),
        ("nan_rollback.nan_ratio.ratio=5", "nan_rollback.nan_ratio.ratio is 5.*1 or less"),
        ("nan_rollback.lr_factor=1.5", "nan_rollback.lr_factor is 1.5"),
        ("nan_rollback.strikes=0", "nan_rollback.strikes is 0"),
        ("nan_rollback.loss_spike.zscore=3", "unknown key nan_rollback.loss_spike.zscore.*z_score"),
        ("trainer.precision=amp_fp16", "amp_fp16.*use amp_bf16"),
        ("trainer.scale_schedule_ratio=0.5", "trainer.scale_schedule_ratio cannot be set: set `max_duration`"),
    ],
)
def test_mistakes(tmp_path: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, override)
