"""Launches of the command line that a test can signal: the true one, or one that was imported beforehand."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.launch import REPOSITORY, end_hung

SCRIPT = "recipe/train.py"
SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
}


@dataclass
class Running:
    """A launch under way, in a process group of its own.

    Attributes:
        group: Its process group.
        process: What tells its exit status: the command itself, or the fork server that forked it.
        log: All that it says.
        started: On the clock of `time.time`.
    """

    group: int
    process: "subprocess.Popen[str]"
    log: Path
    started: float
    is_forked: bool = False

    def signal(self, number: signal.Signals) -> None:
        """To every process of it at once, as SLURM does."""
        with suppress(ProcessLookupError):
            os.killpg(self.group, number)

    def wait(self, timeout: float = 300) -> int:
        """Its exit status, as of `subprocess`; after `timeout` seconds it tells where it hangs and is killed."""
        watchdog = threading.Timer(timeout, end_hung, [self.group])
        watchdog.start()
        try:
            if self.is_forked:
                assert self.process.stdout is not None
                return int(self.process.stdout.readline())
            return self.process.wait()
        finally:
            watchdog.cancel()

    def output(self) -> str:
        """So far."""
        return self.log.read_text(errors="replace")


def launch(world_size: int, yaml: Path, log: Path) -> Running:
    """`composer -n WORLD_SIZE recipe/train.py YAML`."""
    command = [sys.executable, "-m", "composer.cli.launcher", "-n", str(world_size)]
    started = time.time()
    process = _popen([*command, SCRIPT, str(yaml)], log)
    return Running(process.pid, process, log, started)


class ForkServer:
    """`python recipe/train.py YAML` without the ten seconds of its imports."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self.process = process

    def launch(self, yaml: Path, log: Path) -> Running:
        """One at a time: wait for it before the next."""
        assert self.process.stdin is not None and self.process.stdout is not None
        log.touch()
        started = time.time()
        self.process.stdin.write(json.dumps({"arguments": [str(yaml)], "log": str(log)}) + "\n")
        self.process.stdin.flush()
        return Running(int(self.process.stdout.readline()), self.process, log, started, is_forked=True)


@contextmanager
def fork_server(log: Path) -> Iterator[ForkServer]:
    """Of `recipe/train.py`.

    Args:
        log: Of the server itself.
    """
    script = Path(__file__).with_name("fork_server.py")
    command = [sys.executable, str(script), str(REPOSITORY / SCRIPT)]
    process = _popen(command, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield ForkServer(process)
    finally:
        process.kill()
        process.wait()


def _popen(command: list[str], log: Path, **streams: Any) -> "subprocess.Popen[str]":
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **SETTINGS},
            text=True,
            start_new_session=True,
            **{
                "stdin": subprocess.DEVNULL,
                "stdout": output,
                "stderr": output if streams else subprocess.STDOUT,
                **streams,
            },
        )
