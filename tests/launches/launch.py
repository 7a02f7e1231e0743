"""Launch a script in one or several gloo processes, signal it, and show how it ends.

Launches are forked from a process that has the imports done (`fork_server.py`): they take nine tenths of a tiny run.
With `forked=False` the command itself runs.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil
from torch import distributed

from tests.support.ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]


def settings() -> dict[str, str]:
    """Return the environment of every launch."""
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TORCH_WARM_POOL": "0",  # no process that compiles: see recipe.upstream.compiler
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    }


@dataclass(frozen=True)
class Launch:
    """What a launch left behind.

    Attributes:
        returncode: Of the launcher: that of the first rank that failed, else 0.
        output: stdout and stderr of rank 0, and of every rank that crashed.
    """

    returncode: int
    output: str


@dataclass
class Running:
    """A launch under way, in a process group of its own.

    Attributes:
        command: For messages.
        group: Its process group.
        process: Gives its exit status: the command itself, or the fork server that forked it.
        log: Everything that it prints.
        started: On the clock of `time.time`.
        is_forked: Whether `process` is the fork server.
    """

    command: str
    group: int
    process: "subprocess.Popen[str]"
    log: Path
    started: float
    is_forked: bool

    def signal(self, number: signal.Signals) -> None:
        """Send it to every process of the launch at once, as SLURM does."""
        with suppress(ProcessLookupError):
            os.killpg(self.group, number)

    def wait(self, timeout: float = 300) -> int:
        """Return its exit status once all its processes have ended; kill those that a failed launch leaves behind.

        Args:
            timeout: Seconds; after it the processes print where they hang and are killed, and the test fails.
        """
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            end_hung(self.group)

        watchdog = threading.Timer(timeout, expire)
        watchdog.start()
        try:
            if self.is_forked:
                assert self.process.stdout is not None
                status = int(self.process.stdout.readline())
            else:
                status = self.process.wait()
            if status:
                self.signal(signal.SIGKILL)  # a killed rank leaves its loader's workers and those that upload
            while not expired.is_set() and is_alive(self.group):
                time.sleep(0.01)
        finally:
            watchdog.cancel()
        watchdog.join()
        assert not expired.is_set(), f"{self.command} ran past {timeout} s:\n{self.output()}"
        return status

    def output(self) -> str:
        """Return what it has printed so far."""
        return self.log.read_text(errors="replace")


def start(
    world_size: int,
    script: str | Path,
    *arguments: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    forked: bool = True,
) -> Running:
    """Start `composer -n WORLD_SIZE SCRIPT ARGUMENTS` on the CPU in the root of the repository.

    Wait for a forked launch before you start the next one.

    Args:
        world_size: Number of ranks; 0: `python SCRIPT ARGUMENTS`.
        script: The path of a Python file, relative to the repository or absolute.
        arguments: Of the script.
        log: File that gets stdout and stderr.
        env: Added to the environment.
        forked: Skip the imports.
    """
    launcher = ["-m", "composer.cli.launcher", "-n", str(world_size), "--master_port", str(free_port())]
    command = [sys.executable, *(launcher if world_size else []), str(script), *arguments]
    environment = {**settings(), **(env or {})}
    log.touch()
    started = time.time()
    if forked:
        server = fork_server()
        assert server.stdin is not None and server.stdout is not None
        request = {"world_size": world_size, "script": str(script), "arguments": arguments}
        print(json.dumps({**request, "log": str(log), "env": environment}), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, f"the fork server has ended with {server.wait()}"
        return Running(" ".join(command), int(answer), server, log, started, is_forked=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    return Running(" ".join(command), process.pid, process, log, started, is_forked=False)


@functools.cache
def fork_server() -> "subprocess.Popen[str]":
    """Start the session's fork server; it ends with its stdin."""
    script = Path(__file__).with_name("fork_server.py")
    return subprocess.Popen(
        [sys.executable, str(script)],
        cwd=REPOSITORY,
        env=settings(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_composer(
    world_size: int,
    script: str | Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    check: bool = True,
    forked: bool = True,
) -> Launch:
    """Run what `start` starts to its end.

    Args:
        world_size: Number of ranks; 0: `python SCRIPT ARGUMENTS`.
        script: The path of a Python file, relative to the repository or absolute.
        arguments: Of the script.
        env: Added to the environment.
        timeout: Seconds; of `Running.wait`.
        check: Fail the test, showing the output, if the script fails.
        forked: Skip the imports.
    """
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        running = start(world_size, script, *arguments, log=Path(log.name), env=env, forked=forked)
        status = running.wait(timeout)
        output = running.output()
    if check and status != 0:
        raise AssertionError(f"{running.command} ended with {status}:\n{output}")
    return Launch(status, output)


def is_alive(group: int) -> bool:
    """Return whether a process of the group still runs, such as a loader's worker that was left behind."""
    with suppress(ProcessLookupError):
        os.killpg(group, 0)
        for process in psutil.process_iter(["status"]):
            with suppress(ProcessLookupError):
                if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                    return True
    return False


def end_hung(group: int, patience: float = 15) -> None:
    """Kill a process group after its processes have printed where they are, which `PYTHONFAULTHANDLER` makes them do.

    Args:
        group: The process that leads it, a launcher or the only rank. It comes last, since a launcher prints what its
            ranks have printed once they have crashed, and then ends by itself.
        patience: Seconds for that, each.
    """
    with suppress(psutil.NoSuchProcess):
        leader = psutil.Process(group)
        for processes in (leader.children(recursive=True), [leader]):
            leader.suspend()  # a launcher that sees the first rank end would end the others before they print
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGABRT)
                time.sleep(0.05)  # one prints after the other
            leader.resume()
            if processes:
                psutil.wait_procs({*processes, leader}, patience)
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def leave() -> NoReturn:
    """End this rank with 0 once all ranks are here; destroy nothing, since gloo of torch 2.7 can wait indefinitely."""
    distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
