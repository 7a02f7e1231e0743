"""Make the recipe's own log lines visible beside Composer's progress bar."""

import logging
import os


def setup_logging() -> None:
    """Shows warnings of every library and, on rank 0, what the recipe reports; call once, first in an entry."""
    rank = os.environ.get("RANK", "0")
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s rank {rank} %(name)s %(levelname)s: %(message)s")
    logging.getLogger("recipe").setLevel(logging.INFO if rank == "0" else logging.WARNING)
