"""A training on a disk that fills up: `full_disk_run.py FOLDER LARGEST_FILE_IN_BYTES` (0: no bound).

Writes FOLDER/trained.json, since a thread's traceback can stand in the middle of a printed line.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from recipe.callbacks.table import build_loggers
from recipe.console import setup_logging
from tests.callbacks.test_table import train

if __name__ == "__main__":
    # A pipe to the console: the file that the test keeps of it would be bounded too.
    console = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    assert console.stdin is not None
    for stream in (1, 2):
        os.dup2(console.stdin.fileno(), stream)
    setup_logging()
    folder = Path(sys.argv[1])
    loggers = build_loggers({"json_lines": {}, "tensorboard": {}, "file": {}}, str(folder))
    _, unbounded = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]) or unbounded, unbounded))
    weights, next_numbers = train([], loggers)
    resource.setrlimit(resource.RLIMIT_FSIZE, (unbounded, unbounded))
    trained = [{name: value.tolist() for name, value in weights.items()}, next_numbers]
    (folder / "trained.json").write_text(json.dumps(trained))
