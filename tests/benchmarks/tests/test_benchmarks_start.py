"""Start each script of `tests/benchmarks` as its docstring says, from the repository and with nothing set."""

from pathlib import Path

import pytest

from tests.launches.launch import run_composer

FOLDER = Path(__file__).parents[1]
SCRIPTS = [path.name for path in sorted(FOLDER.glob("*.py")) if "argparse.ArgumentParser" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_starts(name: str) -> None:
    assert f"usage: {name}" in run_composer(0, f"tests/benchmarks/{name}", "--help", env={"PYTHONPATH": ""}).output
