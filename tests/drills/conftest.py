"""What the drills share: data, a server of quick launches, a training that was never stopped."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.drills.drill_cases import STEPS, write_data, write_yaml
from tests.drills.drill_run import Run
from tests.drills.launches import ForkServer, fork_server, launch


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the data, and the runs of this file."""
    folder = tmp_path_factory.mktemp("drill")
    write_data(folder / "data")
    return folder


@pytest.fixture(scope="session")
def make_run(tiny_checkpoint: str, folder: Path) -> Callable[[str], Run]:
    return lambda name: Run(write_yaml(folder / f"{name}.yaml", tiny_checkpoint, folder / "data", STEPS))


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[ForkServer]:
    with fork_server(folder / "server.log") as server:
        yield server


@pytest.fixture(scope="session")
def whole(make_run: Callable[[str], Run], folder: Path) -> Run:
    """Never stopped, by the true command."""
    run = make_run("whole")
    run.finish(launch(1, run.yaml, folder / "whole.log"))
    return run
