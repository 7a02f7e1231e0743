"""Fork launches from one process that has imported what they need: `fork_server.py`, a helper of the tests.

Each line of JSON on stdin, the fields of `Request`, asks for what `composer -n WORLD_SIZE SCRIPT ARGUMENTS` does, or
`python SCRIPT ARGUMENTS` if `world_size` is 0. The answer is the process id of the launch, which leads a process group
of its own, then its exit status (-9: by SIGKILL). One launch at a time.

Composer's own launcher watches the ranks, ends them, and prints what a failed one wrote; only their start is ours.
All launches of a session share one hash seed, so an order that depends on it shows in the launches that are not forked.
"""

import gc
import json
import logging
import os
import runpy
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from composer.cli import launcher

import recipe.build
import recipe.callbacks
import recipe.predict
import recipe.train
import tests.support.tiny_cases
from recipe.upstream.cpu_model import read_cpu_model
from tests.support.ports import free_port
from tests.support.segments import number_segments_apart

# Imported for the launches; `recipe.build` before the tests, as the soak disturbs it with modules that need them.
assert recipe.build and recipe.callbacks and recipe.predict and recipe.train and tests.support.tiny_cases


@dataclass(frozen=True)
class Request:
    """One launch.

    Attributes:
        world_size: Number of ranks; 0: the script itself, without a launcher.
        script: Its path, relative to the repository or absolute.
        arguments: Of the script.
        log: File that gets stdout and stderr.
        env: The whole environment.
    """

    world_size: int
    script: str
    arguments: list[str]
    log: str
    env: dict[str, str]


INSTALLED = [path for path in sys.path[1:] if path not in os.environ["PYTHONPATH"].split(os.pathsep)]
FOLDERS: list[Any] = [item for item in gc.get_objects() if type(item) is tempfile.TemporaryDirectory]


class Rank:
    """A forked rank with the part of `subprocess.Popen` that Composer's launcher uses."""

    def __init__(self, pid: int, args: Sequence[str], stdout: IO[str] | None, stderr: IO[str] | None):
        self.pid, self.args, self.stdout, self.stderr = pid, args, stdout, stderr
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def own_folders() -> None:
    """Make this process's own of every temporary folder that an import made; W&B's is removed as its maker ends."""
    for folder in FOLDERS:
        folder._finalizer.detach()
        folder.__init__()


def serve() -> Request | None:
    """Fork one launch after the other until stdin ends; return its request in each child, else None."""
    number_segments_apart()
    read_cpu_model()  # for scripts with a Trainer of their own
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]  # a script finds them only by its own path
    gc.freeze()  # else each fork copies the memory of all these objects when it collects, which takes two seconds
    for line in sys.stdin:
        num_threads = len(os.listdir("/proc/self/task"))
        assert num_threads == 1, f"an import started {num_threads - 1} threads, which no fork would have"
        process = os.fork()
        if process == 0:
            return Request(**json.loads(line))
        os.setpgid(process, process)  # in the child too: the group must exist before its id is reported
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    return None


def become_launch(request: Request) -> None:
    """Take the environment and the streams that the command would have."""
    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(request.env)
    tempfile.tempdir = None  # read from the environment again
    own_folders()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)


def fork_ranks(request: Request) -> None:
    """Return in each rank; in the process that forked them do the rest of `composer.cli.launcher.main` and exit."""
    folder, port = tempfile.mkdtemp(), free_port()
    ranks: dict[int, Any] = {}
    for rank in range(request.world_size):
        paths = [f"{folder}/{rank}.{name}" for name in ("stdout", "stderr")] if rank else []
        files = [open(path, "a+") for path in paths]  # noqa: SIM115
        pid = os.fork()
        if pid == 0:
            become_rank(rank, request.world_size, port, files)
            return
        ranks[rank] = Rank(pid, [request.script, *request.arguments], *(files or (None, None)))
    logging.basicConfig()
    try:
        launcher._monitor_processes(ranks)
    except BaseException:  # Composer makes SIGTERM a SystemExit
        traceback.print_exc()
    finally:
        launcher._cleanup_processes(ranks)
        shutil.rmtree(folder)
    sys.exit(launcher._aggregate_process_returncode(ranks))


def become_rank(rank: int, world_size: int, port: int, files: Sequence[IO[str]]) -> None:
    """Take what Composer's launcher gives a rank: variables and streams."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }
    own_folders()
    for stream, file in enumerate(files, start=1):
        os.dup2(file.fileno(), stream)


def main() -> None:
    """Serve; in a child, run the script as the interpreter would."""
    request = serve()
    if request is None:
        return
    become_launch(request)
    if request.world_size:
        fork_ranks(request)
    np.random.seed()  # otherwise all processes draw the same where a fresh import of numpy would not
    arguments = [os.path.expandvars(os.path.expanduser(argument)) for argument in request.arguments]
    sys.argv = [request.script, *(arguments if request.world_size else request.arguments)]
    given = filter(None, request.env.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [str(Path(request.script).resolve().parent), *given, *INSTALLED]
    runpy.run_path(request.script, run_name="__main__")


if __name__ == "__main__":
    main()
