"""`recipe/eval.py` in gloo processes whose model may be sharded: `composer -n N tests/distributed/eval_run.py YAML`."""

import sys

from recipe.configure import load_config
from recipe.eval import main
from tests.distributed.fsdp_shim import install

if __name__ == "__main__":
    install()
    main(load_config(sys.argv[1]))
