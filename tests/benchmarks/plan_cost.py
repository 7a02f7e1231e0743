"""Plans one epoch of a lognormal mix in a process of its own; prints JSON: `seconds` of one core, added `peak_gb`.

python tests/benchmarks/plan_cost.py NUM_SAMPLES [--augment]

With `--augment` it measures what augmentation adds: the lengths of an epoch in which each sample, an image of 640 x 480
with seven objects, is shown flipped, in part and in another size. `table_gb` is what each process keeps.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recipe.config import AugmentConfig, CropConfig, PromptConfig
from recipe.data.augment import Augmentation, Moves
from recipe.data.drawn_lengths import DrawnTable, Parts, Pieces
from recipe.data.encode import Encoder
from recipe.data.lengths import Lengths
from recipe.data.plan import Budget, plan_packs
from recipe.schema import ImageSpec
from recipe.tiny import build_tiny_tokenizer, tokenizer_corpus

MAX_TOKENS = 4096
OBJECTS = 7  # per augmented sample
WINDOW = 1024


def lognormal_mix(num_samples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(tokens, patches): 819 tokens in the mean, a picture in six samples of seven."""
    rng = np.random.default_rng(0)
    tokens = np.clip(rng.lognormal(6.606, 0.45, num_samples), 16, MAX_TOKENS).astype(np.int64)
    image_share = np.where(rng.random(num_samples) < 6 / 7, rng.uniform(0.3, 0.9, num_samples), 0)
    return tokens, 4 * (tokens * image_share).astype(np.int64)


def drawn_table(num_samples: int) -> DrawnTable:
    """The table that a count of such samples would give."""
    rng, ones = np.random.default_rng(0), np.ones(num_samples, dtype=np.int64)
    spec = ImageSpec(14, 2, 3136, 1003520, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    encoder = Encoder(build_tiny_tokenizer(tokenizer_corpus()), None, spec, PromptConfig(), 32, MAX_TOKENS)
    config = AugmentConfig(horizontal_flip=0.5, crop=CropConfig(), scale_jitter=[0.5, 1.5])
    corners = rng.uniform(0, 400, (num_samples * OBJECTS, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(20, 80, corners.shape)], axis=1).astype(np.float32)
    count = np.full(num_samples, OBJECTS, dtype=np.int32)
    parts = Parts(
        sizes=np.tile(np.array([[640, 480]], dtype=np.int32), (num_samples, 1)),
        moves=np.full(num_samples, int(Moves.SCALE | Moves.FLIP | Moves.CROP), dtype=np.uint8),
        num_boxes=count,
        num_anchors=count,
        numbers_in_prompt=0 * count,
        varying=0 * count,
        boxes=boxes,
        kinds=np.zeros(len(boxes), dtype=np.uint8),
        words=np.full((len(boxes), 4), 12, dtype=np.int32),
    )
    pieces = Pieces(encoder)
    samples = Lengths(900 * ones, 1600 * ones, ones > 0, ones, pieces.list * ones, OBJECTS * ones)
    return DrawnTable(samples, None, ones[:0], ones[:0], parts, None, encoder, Augmentation.of(config, spec, 3))


def measure_drawn(num_samples: int) -> None:
    """Prints the cost of the lengths of one epoch."""
    table = drawn_table(num_samples)
    table.of_epoch(0, np.arange(9))  # counts the tokens of numbers
    before = memory_gb("VmRSS")
    start = time.process_time()
    tokens, _ = table.of_epoch(1, np.arange(num_samples))
    seconds = time.process_time() - start
    assert len(np.unique(tokens)) > 50
    kept = sum(array.nbytes for array in vars(table.parts).values()) / 1e9
    peak = memory_gb("VmHWM") - before
    print(json.dumps({"seconds": round(seconds, 2), "peak_gb": round(peak, 3), "table_gb": round(kept, 3)}))


def main() -> None:
    """Command line."""
    num_samples = int(sys.argv[1])
    if "--augment" in sys.argv:
        measure_drawn(num_samples)
        return
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
