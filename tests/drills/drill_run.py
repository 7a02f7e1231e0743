"""Follow one training over its launches: signal it, look at its damage, compare its end."""

import signal
import time
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path

from recipe.checkpoints.check import newest_valid
from tests.drills.drill_cases import STEPS, assert_same_training
from tests.drills.moments import START, File, Moment, first_step, losses, moment_of, unfinished
from tests.launches.launch import Running, start

PATIENCE = 120  # seconds without the moment that is waited for


@dataclass
class Run:
    """A training over its launches.

    Attributes:
        yaml: The run's folder is next to it.
        kills: What was waited for, where the kill hit, the newest valid checkpoint after it.
    """

    yaml: Path
    kills: list[tuple[Moment, Moment, int]] = field(default_factory=list[tuple[Moment, Moment, int]])

    @property
    def folder(self) -> Path:
        return self.yaml.with_suffix("")

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def launch(self, name: str, world_size: int = 1, forked: bool = True) -> Running:
        """Start `composer -n WORLD_SIZE recipe/train.py YAML`; a forked one of one rank needs no launcher.

        Args:
            name: Of the log, next to the yaml.
            world_size: Number of ranks.
            forked: Skip the imports.
        """
        log = self.yaml.with_name(f"{name}.log")
        num_ranks = 0 if forked and world_size == 1 else world_size
        return start(num_ranks, "recipe/train.py", str(self.yaml), log=log, forked=forked)

    def newest(self) -> int:
        """Return the batches of the newest valid checkpoint; 0: there is none."""
        found = newest_valid(str(self.checkpoints)) if self.checkpoints.exists() else None
        return found.manifest.batch if found else 0

    def kill(self, running: Running, wanted: Moment, delay: float) -> None:
        """Wait for the moment, then `delay` seconds, and kill; check at which batch the launch had begun."""
        newest, leftovers = self.newest(), unfinished(self.checkpoints)
        try:
            wait_for(wanted, self.folder, running, leftovers)
            time.sleep(delay)
        finally:
            running.signal(signal.SIGKILL)
            status = running.wait()
        assert status == -signal.SIGKILL, f"ended before it was killed at {wanted}: {running.output()}"
        self._check_beginning(running, newest)
        hit = moment_of(self.folder, running.started, leftovers)
        self.kills.append((wanted, hit, self.newest()))
        print(f"kill {len(self.kills)} wanted at {wanted}, hit at {hit}, newest checkpoint {self.kills[-1][2]}")

    def terminate(self, running: Running, wanted: Moment, times: int = 1) -> int:
        """Wait for the moment and send SIGTERM to all processes; return the exit status."""
        newest, leftovers = self.newest(), unfinished(self.checkpoints)
        try:
            wait_for(wanted, self.folder, running, leftovers)
            for _ in range(times):
                running.signal(signal.SIGTERM)
                time.sleep(0.02)
        finally:
            status = running.wait()
        self._check_beginning(running, newest)
        return status

    def finish(self, running: Running) -> None:
        """Wait until it has ended by itself."""
        newest = self.newest()
        assert running.wait() == 0, running.output()
        assert first_step(self.folder, running.started) == newest

    def _check_beginning(self, running: Running, newest: int) -> None:
        began = first_step(self.folder, running.started)
        assert began in (None, newest), f"began at {began} with a checkpoint of batch {newest}: {running.output()}"


def wait_for(wanted: Moment, folder: Path, running: Running, leftovers: Set[File]) -> None:
    """Return in the first such phase of that batch or a later one; of the start, once training is about to begin."""
    until = time.monotonic() + PATIENCE
    while True:
        moment = moment_of(folder, running.started, leftovers)
        if wanted.phase == START and "recipe.callbacks.summary" in running.output():  # the script has begun
            return
        if moment.phase == wanted.phase != START and moment.batch >= wanted.batch:
            return
        assert moment.batch < STEPS and time.monotonic() < until, f"{wanted} never came: {running.output()}"
        time.sleep(0.001)


def assert_same_end(run: Run, whole: Run) -> None:
    """Assert the same weights, optimizer and clock, also of the best checkpoint; the same files and logged losses."""
    for name in ("latest-rank0.pt", "best-rank0.pt"):
        assert_same_training(run.checkpoints / name, whole.checkpoints / name)
    names = [{path.name for path in each.checkpoints.iterdir()} for each in (run, whole)]
    assert names[0] == names[1], "the same checkpoints are kept, and nothing else is left"
    assert losses(run.folder) == losses(whole.folder), "every batch is logged once"
