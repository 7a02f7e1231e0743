"""Share among the drills: data, and a training that was never stopped."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.drills.drill_cases import STEPS, write_data, write_yaml
from tests.drills.drill_run import Run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that holds the data, and the runs of this file."""
    folder = tmp_path_factory.mktemp("drill")
    write_data(folder / "data")
    return folder


@pytest.fixture(scope="session")
def make_run(tiny_checkpoint: str, folder: Path) -> Callable[[str], Run]:
    return lambda name: Run(write_yaml(folder / f"{name}.yaml", tiny_checkpoint, folder / "data", STEPS))


@pytest.fixture(scope="session")
def whole(make_run: Callable[[str], Run], folder: Path) -> Run:
    """Run the real command, never stopped."""
    run = make_run("whole")
    run.finish(run.launch("whole", forked=False))
    return run
