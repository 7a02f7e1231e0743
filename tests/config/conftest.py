"""Fixtures of the tests of the configuration."""

from pathlib import Path

import pytest
from config_cases import MINIMAL, write_yaml


@pytest.fixture(autouse=True)
def any_model(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every name is a Qwen2.5-VL's, except `nosuch`."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')

    def find(name: str, file: str) -> str:
        if name == "nosuch":
            raise OSError("nosuch is not a local folder")
        return str(folder / file)

    monkeypatch.setattr("recipe.checks.cached_file", find)


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    return write_yaml(tmp_path, MINIMAL)
