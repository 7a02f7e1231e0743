"""A training on a disk that fills up: `full_disk_run.py FOLDER LARGEST_FILE_IN_BYTES` (0: no bound)."""

import json
import resource
import sys
from pathlib import Path

from recipe.callbacks.table import build_loggers
from recipe.logging_setup import setup_logging
from tests.callbacks.test_table import make_config, train

if __name__ == "__main__":
    setup_logging()
    loggers = build_loggers(make_config(Path(sys.argv[1]), json_lines={}, tensorboard={}, file={}))
    if int(sys.argv[2]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
    weights, next_numbers = train([], loggers)
    print("result", json.dumps([{name: value.tolist() for name, value in weights.items()}, next_numbers]))
