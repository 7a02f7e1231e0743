"""Plans one epoch of a lognormal mix in a process of its own; prints JSON: `seconds` of one core, added `peak_gb`.

python tests/benchmarks/plan_cost.py NUM_SAMPLES
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recipe.data.plan import Budget, plan_packs

MAX_TOKENS = 4096
WINDOW = 1024


def lognormal_mix(num_samples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(tokens, patches): 819 tokens in the mean, a picture in six samples of seven."""
    rng = np.random.default_rng(0)
    tokens = np.clip(rng.lognormal(6.606, 0.45, num_samples), 16, MAX_TOKENS).astype(np.int64)
    image_share = np.where(rng.random(num_samples) < 6 / 7, rng.uniform(0.3, 0.9, num_samples), 0)
    return tokens, 4 * (tokens * image_share).astype(np.int64)


def main() -> None:
    """Command line."""
    num_samples = int(sys.argv[1])
    tokens, patches = lognormal_mix(num_samples)
    order = np.random.default_rng(1).permutation(num_samples)
    before = memory_gb("VmRSS")
    start = time.process_time()
    plan = plan_packs(order, np.arange(num_samples), tokens, patches, 1, Budget(MAX_TOKENS, None, WINDOW), 0, 0)
    seconds = time.process_time() - start
    assert len(plan.samples) == num_samples
    print(json.dumps({"seconds": round(seconds, 2), "peak_gb": round(memory_gb("VmHWM") - before, 3)}))


def memory_gb(key: str) -> float:
    """Return this process's memory; ru_maxrss is no help, as a process inherits it from the one that started it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) * 1024 / 1e9


if __name__ == "__main__":
    main()
