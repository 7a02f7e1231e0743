"""Plan one epoch of a lognormal mix in a process of its own; print JSON.

    python tests/benchmarks/plan_cost.py NUM_SAMPLES [--nodes N] [--augment]

First comes Streaming's shuffle over `N` canonical nodes (default 1) of shards of 1,000 samples, then the packs.
`seconds` of one core are of the packs, `shuffle_seconds` of the shuffle. `peak_gb` is what both add at most to the
lengths. Those are kept in a file that the processes of a node share, and so is the plan, of `plan_gb`.

With `--augment` it measures what augmentation adds: the lengths of an epoch in which each sample, an image of 640 x 480
with seven objects, is shown flipped, in part and in another size. `table_gb` is what each process keeps.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from streaming.base.shuffle import get_shuffle

from recipe.config import AugmentConfig, CropConfig, PromptConfig
from recipe.data.augment import Augmentation, Moves
from recipe.data.drawn_lengths import DrawnTable, Parts, Pieces
from recipe.data.encode import Encoder
from recipe.data.lengths import Lengths
from recipe.data.mapped import small_ints
from recipe.data.plan import Budget, plan_packs
from recipe.schema import ImageSpec
from recipe.tiny import build_tiny_tokenizer, tokenizer_corpus

MAX_TOKENS = 4096
OBJECTS = 7  # per augmented sample
WINDOW = 1024
SHARD = 1000  # samples
BLOCK = 1 << 18  # Streaming's default


def lognormal_mix(num_samples: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return (tokens, patches): 819 tokens in the mean, an image in six samples of seven."""
    rng = np.random.default_rng(0)
    tokens = np.clip(rng.lognormal(6.606, 0.45, num_samples), 16, MAX_TOKENS).astype(np.int64)
    image_share = np.where(rng.random(num_samples) < 6 / 7, rng.uniform(0.3, 0.9, num_samples), 0)
    return tokens.astype(np.int32), 4 * (tokens * image_share).astype(np.int32)


def drawn_table(num_samples: int) -> DrawnTable:
    """Return the table that a count of such samples would give."""
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
    """Print the cost of the lengths of one epoch."""
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
    """Plan, or draw lengths with `--augment`, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num_samples", type=int)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--augment", action="store_true")
    args = parser.parse_args()
    if args.augment:
        measure_drawn(args.num_samples)
        return
    tokens, patches = lognormal_mix(args.num_samples)
    units = np.full(-(-args.num_samples // SHARD), SHARD)
    units[-1] -= units.sum() - args.num_samples
    Path("/proc/self/clear_refs").write_text("5")  # the peak of what made the lengths
    before, start = memory_gb("VmRSS"), time.process_time()
    order = small_ints(get_shuffle("py1e", units, args.nodes, 0, 0, BLOCK), args.num_samples)
    shuffled = time.process_time()
    plan = plan_packs(order, None, tokens, patches, args.nodes, Budget(MAX_TOKENS, None, WINDOW), 0, 0)
    done, peak = time.process_time(), memory_gb("VmHWM") - before
    assert len(plan.samples) == args.num_samples
    row = {
        "seconds": done - shuffled,
        "shuffle_seconds": shuffled - start,
        "peak_gb": peak,
        "plan_gb": (plan.occurrences.nbytes + plan.tokens.nbytes + plan.offsets.nbytes) / 1e9,
        "packs": plan.num_packs,
    }
    print(json.dumps({name: round(value, 3) for name, value in row.items()}))


def memory_gb(key: str) -> float:
    """Return this process's memory; not ru_maxrss, which a process inherits from the one that started it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) * 1024 / 1e9


if __name__ == "__main__":
    main()
