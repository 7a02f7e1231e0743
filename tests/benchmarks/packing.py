"""Measure how full packs are, and what planning costs.

    python tests/benchmarks/packing.py [--data SHARED_DATA] [--llm-foundry CHECKOUT] [--num-samples 10000]

Lengths are those of the real sets' conversations under the true Qwen2.5 tokenizer, without teachers and with 0 to 3
(as many of those drawn as fit), and of a lognormal mix. Each set is shown as it is, one epoch of some hundred
samples, and as a stream that repeats it to `--num-samples`. If packs are less than 0.985 full, the bound says what no
packer can exceed. LLM Foundry's own packer runs next to ours if its checkout is given.

The last line is JSON: `fill`, `fill_padded` and `fill_llm_foundry`, each its own worst stream; `plan_seconds` by number
of samples, one core; `plan_peak_gb`; and `not_counted`, the streams left out of the worst with their fill and bound:
those that no packer could fill to 0.985, and the sets as they are, whose last pack is a large share.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from fill_bound import fill_bound
from llm_foundry import foundry_fill, load_packing
from plan_cost import MAX_TOKENS, WINDOW, lognormal_mix
from real_sets import build_qwen_tokenizer, read_samples
from recipe.config import PromptConfig, TeacherConfig
from recipe.data.encode import Encoder
from recipe.data.lengths import count_lengths, count_teachers
from recipe.data.plan import Budget, plan_packs
from recipe.data.teachers import TeacherPool
from recipe.schema import ImageSpec

SETS = ("chess_train", "bccd_trainval", "wagon_train", "coco_cc_train")
MOST_TEACHERS = 3
PADDED_BATCH = 8
AIM = 0.985
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

Lengths = NDArray[np.int64]


@dataclass
class Row:
    """One stream: the fill of each way; None: not run or not needed."""

    name: str
    num_samples: int
    mean: float
    ours: float
    bound: float | None
    padded: float
    foundry: float | None

    def __str__(self) -> str:
        optional = ["" if value is None else f"{value:.4f}" for value in (self.bound, self.foundry)]
        return (
            f"| {self.name} | {self.num_samples} | {self.mean:.0f} | {self.ours:.4f} | {optional[0]} "
            f"| {self.padded:.4f} | {optional[1]} |"
        )


def set_lengths(folder: Path, encoder: Encoder, num_samples: int) -> tuple[Lengths, Lengths, Lengths, float]:
    """Return the tokens of the set as it is, of a stream that repeats it, and of that stream with 0 to 3 teachers.

    A sample is shown as many of the drawn teachers as fit; last comes the share of samples that are shown fewer. (A run
    refuses such samples at its start, or leaves them out.)
    """
    samples = read_samples(folder)
    lengths = count_lengths(samples, encoder)
    pool = TeacherPool(samples, TeacherConfig(num_teachers=MOST_TEACHERS), seed=0)
    teacher_tokens, _ = count_teachers(pool, encoder)
    occurring = np.arange(num_samples) % len(samples)
    alone = lengths.tokens[occurring]
    added = teacher_tokens[pool.draw(0, 0, lengths.id_hashes[occurring])].cumsum(axis=1)
    with_teachers = np.concatenate([alone[:, None], alone[:, None] + added], axis=1)  # (occurrences, 1 + teachers)
    drawn = np.random.default_rng(0).integers(0, MOST_TEACHERS + 1, num_samples)
    shown = np.minimum(drawn, (with_teachers <= MAX_TOKENS).sum(axis=1) - 1)
    trimmed = float(np.mean(shown < drawn))
    return lengths.tokens, alone, with_teachers[np.arange(num_samples), shown], trimmed


def all_lengths(data: Path, num_samples: int, trimmed: dict[str, float]) -> Iterator[tuple[str, Lengths]]:
    """Yield the tokens of every mix, by name; a name ending in `, as it is` is one epoch of a small set.

    `trimmed` gets the share of each set's samples that are shown fewer teachers than drawn.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_qwen_tokenizer(data / "tokenizer", Path(folder))
    spec = ImageSpec(14, 2, 4 * 28 * 28, 1280 * 28 * 28, (0.5,) * 3, (0.5,) * 3)
    encoder = Encoder(tokenizer, None, spec, PromptConfig(), max_caption_tokens=32, max_seq_len=MAX_TOKENS)
    streams: dict[str, list[Lengths]] = {"no teachers": [], "0-3 teachers": []}
    for name in SETS:
        as_it_is, alone, few_shot, trimmed[name] = set_lengths(data / name, encoder, num_samples)
        yield f"{name}, as it is", as_it_is
        yield f"{name}, no teachers", alone
        yield f"{name}, 0-3 teachers", few_shot
        streams["no teachers"].append(alone)
        streams["0-3 teachers"].append(few_shot)
    for kind, parts in streams.items():
        yield f"all four, {kind}", np.concatenate(parts)
    yield "lognormal mix", lognormal_mix(4 * num_samples)[0].astype(np.int64)


def measure(name: str, lengths: Lengths, packing: ModuleType | None) -> Row:
    """Pack one stream in each way, in the same shuffled order."""
    order = np.random.default_rng(0).permutation(len(lengths))
    shuffled = lengths[order]
    no_patches = np.zeros_like(lengths)
    budget = Budget(MAX_TOKENS, None, WINDOW)
    plan = plan_packs(order, np.arange(len(lengths)), lengths, no_patches, 1, budget, seed=0, epoch=0)
    assert sorted(plan.samples.tolist()) == list(range(len(lengths))), "no token is dropped"
    ours = float(lengths.sum() / MAX_TOKENS / plan.num_packs)
    batches = [shuffled[start : start + PADDED_BATCH] for start in range(0, len(shuffled), PADDED_BATCH)]
    padded = float(lengths.sum() / sum(len(batch) * batch.max() for batch in batches))
    return Row(
        name=name,
        num_samples=len(lengths),
        mean=float(lengths.mean()),
        ours=ours,
        bound=fill_bound(lengths, MAX_TOKENS) if ours < AIM else None,
        padded=padded,
        foundry=None if packing is None else foundry_fill(packing, shuffled, MAX_TOKENS),
    )


def plan_costs(counts: list[int]) -> dict[int, dict[str, float]]:
    """Return seconds and memory of planning, each in a fresh process on one core."""
    script = Path(__file__).with_name("plan_cost.py")
    costs = {}
    for count in counts:
        command = [sys.executable, str(script), str(count)]
        costs[count] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return costs


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the real sets and the tokenizer")
    parser.add_argument("--llm-foundry", type=Path, help="checkout of mosaicml/llm-foundry")
    parser.add_argument("--num-samples", type=int, default=10_000, help="of each set's stream")
    args = parser.parse_args()
    packing = None if args.llm_foundry is None else load_packing(args.llm_foundry)
    print("| stream | samples | mean tokens | ours | bound | padded | LLM Foundry |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = []
    trimmed: dict[str, float] = {}
    for name, lengths in all_lengths(args.data, args.num_samples, trimmed):
        rows.append(measure(name, lengths, packing))
        print(rows[-1], flush=True)
    costs = plan_costs([10_000, 100_000, 1_000_000])
    counted = [row for row in rows if not row.name.endswith("as it is") and (row.bound is None or row.bound >= AIM)]
    report = {
        "fill": round(min(row.ours for row in counted), 4),
        "fill_padded": round(min(row.padded for row in counted), 4),
        "fill_llm_foundry": None if packing is None else round(min(row.foundry or 0.0 for row in counted), 4),
        "plan_seconds": {str(count): cost["seconds"] for count, cost in costs.items()},
        "plan_peak_gb": max(cost["peak_gb"] for cost in costs.values()),
        "shown_fewer_teachers": {name: round(share, 4) for name, share in trimmed.items()},
        "not_counted": {
            row.name: [round(row.ours, 4), row.bound and round(row.bound, 4)] for row in rows if row not in counted
        },
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
