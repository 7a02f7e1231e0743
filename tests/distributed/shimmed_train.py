"""Training with FSDP on the CPU: `composer ... tests/distributed/shimmed_train.py YAML [key.sub=value ...]`."""

import sys

from recipe.configure import from_command_line, parser_of
from recipe.console import setup_logging
from recipe.train import EXAMPLES, USAGE, main
from tests.distributed.fsdp_shim import install

if __name__ == "__main__":
    setup_logging()
    install()
    main(from_command_line(parser_of(USAGE, "Train with the shim.", EXAMPLES), sys.argv[1:])[0])
