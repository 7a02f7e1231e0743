"""Each script of `tests/benchmarks` starts as its docstring says, from the repository and with nothing set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"
SCRIPTS = [path.name for path in sorted(FOLDER.glob("*.py")) if "argparse.ArgumentParser" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_starts(name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, f"tests/benchmarks/{name}", "--help"]
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"usage: {name}" in done.stdout, done.stderr
