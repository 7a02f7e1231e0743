"""Starts runs of a script without waiting for its imports: `fork_server.py SCRIPT`, a test's helper.

For each line `{"arguments": [...], "log": PATH}` on stdin it forks a process that does what `python SCRIPT ARGUMENTS`
does, in a process group of its own; prints the process's id, and when it has ended its exit status (-9: by SIGKILL).
"""

import json
import os
import runpy
import sys
from pathlib import Path

import recipe.train

assert recipe.train  # what takes long is imported once, here; no thread is started by it, and no tensor made


def run(script: Path, arguments: list[str], log: str) -> None:
    """As the interpreter would, from here on."""
    os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.path[0] = str(script.parent)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def serve(script: Path) -> None:
    """One run after the other, until stdin ends."""
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            run(script, **json.loads(line))
            sys.exit()
        os.setpgid(process, process)  # here too: the group is there when its id is told
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
