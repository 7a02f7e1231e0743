"""Run a script in several gloo processes through Composer's own launcher, and how those end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil
from torch import distributed

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Launch:
    """What a launch left behind.

    Attributes:
        returncode: Of the launcher: that of the first rank that failed, else 0.
        output: stdout and stderr of rank 0, and of every rank that crashed.
    """

    returncode: int
    output: str


def run_composer(
    world_size: int,
    script: str | Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    check: bool = True,
) -> Launch:
    """Runs `composer -n WORLD_SIZE SCRIPT ARGUMENTS` on the CPU, in the repository's root.

    Args:
        world_size: Number of processes.
        script: The path of a Python file, relative to the repository or absolute.
        arguments: Of the script.
        env: Added to the environment.
        timeout: Seconds; all processes tell where they are and are ended after it.
        check: Fail the test, showing the output, when the script fails.
    """
    command = [sys.executable, "-m", "composer.cli.launcher", "-n", str(world_size), str(script), *arguments]
    settings = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    }
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **settings, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end_hung(process.pid)
        output, _ = process.communicate()
        raise AssertionError(f"{' '.join(command)} ran past {timeout} s:\n{output}") from None
    if check and process.returncode != 0:
        raise AssertionError(f"{' '.join(command)} ended with {process.returncode}:\n{output}")
    return Launch(process.returncode, output)


def end_hung(group: int, patience: float = 15) -> None:
    """Kills a process group after its processes have printed where they are, which `PYTHONFAULTHANDLER` makes them do.

    Args:
        group: The process that leads it, a launcher or the one rank: it comes last, since a launcher shows what its
            ranks have printed once they have crashed.
        patience: Seconds for that, each.
    """
    with suppress(psutil.NoSuchProcess):
        leader = psutil.Process(group)
        for processes in (leader.children(recursive=True), [leader]):
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGABRT)
                time.sleep(0.05)  # one tells after the other
            time.sleep(patience)
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def leave() -> NoReturn:
    """Ends this rank with 0 once all ranks are here, destroying nothing: gloo of torch 2.7 can wait for ever then."""
    distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
