"""The smallest configuration, how a test loads one, and what a refused one is."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from recipe.checks import check_libraries
from recipe.config import ConfigError, RecipeConfig
from recipe.configure import load_config
from recipe.rules import check_config

MINIMAL: dict[str, Any] = {
    "run_folder": "runs/test",
    "model": {"pretrained_model_name_or_path": "tiny"},
    "train_loader": {"streams": {"main": {"local": "data/train"}}, "global_batch_size": 8},
    "eval_loader": {"streams": {"main": {"local": "data/eval"}}, "global_batch_size": 8},
    "trainer": {"max_duration": "2ep"},
}


def write_yaml(folder: Path, content: object) -> str:
    path = folder / "run.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def load_and_check(path: str, *overrides: str) -> RecipeConfig:
    config = load_config(path, overrides)
    check_config(config)
    check_libraries(config)
    return config


def assert_one_line(path: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as raised:
        load_and_check(path, *overrides)
    assert "\n" not in str(raised.value)
