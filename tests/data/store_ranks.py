"""Run by several ranks: reads the rows of several folders of a store, and tells what came of each on every rank."""

import sys
from pathlib import Path

from composer.utils import dist, get_device

from recipe.upstream import fetch
from tests.data.storage_cases import open_rows, read_numbers


def read(name: str, folder: Path, num_workers: int) -> str:
    stream = {"remote": f"s3://rows/{name}", "local": str(folder), "download_retry": 2, "download_timeout": 10}
    try:
        return f"read {len(read_numbers(open_rows(stream), num_workers))} rows"
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")


if __name__ == "__main__":
    fetch.FIRST_BACKOFF = 0.01
    dist.initialize_dist(get_device("cpu"), timeout=120.0)
    for num_workers in (0, 2):
        for name in ("whole", "no-index", "no-shard"):
            outcome = read(name, Path(sys.argv[1], f"{name}-{num_workers}"), num_workers)
            told = dist.all_gather_object(outcome)
            if dist.get_global_rank() == 0:
                for rank, text in enumerate(told):
                    print(f"rank {rank} with {num_workers} workers from {name}: {text}", flush=True)
