"""The plan of an epoch: which samples share a pack, and the order of packs; kept on this node's disk."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from tempfile import gettempdir

import numpy as np
from filelock import FileLock
from jaxtyping import Bool, Int64
from numpy.typing import NDArray

from recipe.data.lengths import read_arrays, write_arrays
from recipe.data.pack import pack_ordered

_PURPOSE = 2  # separates the generators of packs from those of Streaming's shuffle, which have the same seeds
_SECONDS_KEPT = 24 * 3600


@dataclass(frozen=True)
class Budget:
    """What a pack may hold."""

    max_tokens: int  # of all its conversations
    max_patches: int | None  # of all its images; None: any number
    window: int  # samples, in shuffled order, that are packed together
    max_seq_len: int | None = None  # tokens of one sample; None: as many as a pack

    def fits(self, tokens: Int64[np.ndarray, " S"], patches: Int64[np.ndarray, " S"]) -> Bool[np.ndarray, " S"]:
        """Return which samples are within the budget alone."""
        max_tokens = min(self.max_tokens, self.max_seq_len or self.max_tokens)
        return (tokens <= max_tokens) & (self.max_patches is None or patches <= self.max_patches)


@dataclass(frozen=True)
class Plan:
    """The packs of one epoch, in order; pack p holds entries `offsets[p]` to `offsets[p + 1]`."""

    occurrences: Int64[np.ndarray, " S"]  # the epoch's samples by their place before the shuffle
    samples: Int64[np.ndarray, " S"]  # their positions in the stored data
    tokens: Int64[np.ndarray, " S"]  # their planned tokens; 0 if lengths are unknown
    offsets: Int64[np.ndarray, " ends"]  # P + 1
    left_out: Int64[np.ndarray, " K"]  # the stored positions of occurrences too large for any pack

    @property
    def num_packs(self) -> int:
        """Return P."""
        return len(self.offsets) - 1

    def entries(self, number: int) -> slice:
        """Return where a pack's samples are; an inert pack has the number `-1 - pack`."""
        pack = number if number >= 0 else -1 - number
        return slice(int(self.offsets[pack]), int(self.offsets[pack + 1]))

    def digest(self) -> str:
        """Return 16 hex digits that identify the plan."""
        content = sha256()
        for array in vars(self).values():
            content.update(array.tobytes())
        return content.hexdigest()[:16]


def plan_samples(order: Int64[np.ndarray, " used"], samples: Int64[np.ndarray, " S"], num_canonical_nodes: int) -> Plan:
    """Return a plan with one sample per pack, for training without packing; arguments as of `plan_packs`."""
    rows = [[[position] for position in row] for row in _rows(len(order), num_canonical_nodes)]
    none = np.empty(0, dtype=np.int64)
    return _assemble(rows, order, samples, tokens=np.zeros(len(samples), dtype=np.int64), left_out=none)


def plan_packs(
    order: Int64[np.ndarray, " used"],
    samples: Int64[np.ndarray, " S"],
    tokens: Int64[np.ndarray, " S"],
    patches: Int64[np.ndarray, " S"],
    num_canonical_nodes: int,
    budget: Budget,
    seed: int,
    epoch: int,
) -> Plan:
    """Pack each canonical node's share of the order, so that a node keeps reading its own shards.

    `order` holds the epoch's occurrences, shuffled; those over the budget alone are left out. `samples`, `tokens` and
    `patches` hold the stored position of each occurrence and its lengths, including its teachers.
    """
    fits = budget.fits(tokens, patches)
    left_out = samples[np.sort(order[~fits[order]])]
    order = order[fits[order]]
    tokens_in_order, patches_in_order = tokens[order], patches[order]
    rows = []
    for node, row in enumerate(_rows(len(order), num_canonical_nodes)):
        share = slice(row.start, row.stop)
        rng = np.random.default_rng([seed, epoch, node, _PURPOSE])
        packs = pack_ordered(
            tokens_in_order[share], patches_in_order[share], budget.max_tokens, budget.max_patches, budget.window, rng
        )
        rows.append([[row.start + position for position in pack] for pack in packs])
    num_packs = max(len(row) for row in rows)
    rows = [_split_emptiest(row, num_packs, tokens_in_order) for row in rows]
    return _assemble(rows, order, samples, tokens, left_out)


def assign_packs(
    num_packs: int, first: int, num_nodes: int, ranks_per_node: int
) -> Int64[np.ndarray, "{num_nodes} {ranks_per_node} packs"]:
    """Assign the packs from `first` on to ranks in turn, so that a step takes the same packs at any world size.

    If the ranks do not divide the remaining packs, the last pack is repeated as `-1 - pack`: it keeps ranks in step
    and is not counted.

    """
    left = np.arange(first, num_packs)
    missing = -len(left) % (num_nodes * ranks_per_node)
    left = np.concatenate([left, np.full(missing, -num_packs)])
    # Neighbours go to different nodes first: they come from different canonical nodes.
    return left.reshape(-1, ranks_per_node, num_nodes).transpose(2, 1, 0)


def assign_to_worker(
    packs: Int64[np.ndarray, " packs"], worker: int, num_workers: int, batch_size: int
) -> Int64[np.ndarray, " own"]:
    """Return a loader worker's packs of a rank: every `num_workers`-th batch, as the DataLoader collects them."""
    return packs[np.arange(len(packs)) // batch_size % num_workers == worker]


def _rows(num_samples: int, num_canonical_nodes: int) -> list[range]:
    """Return the share of each canonical node, as Streaming's partition cuts them."""
    ends = [num_samples * node // num_canonical_nodes for node in range(num_canonical_nodes + 1)]
    return [range(start, end) for start, end in pairwise(ends)]


def _split_emptiest(packs: list[list[int]], num_packs: int, tokens: NDArray[np.int64]) -> list[list[int]]:
    """Halve the emptiest packs of two or more samples until there are `num_packs`, if there are enough.

    Nodes with equally many packs read in step. Moving whole packs between nodes read a third more shards (measured).
    """
    divisible = [index for index, pack in enumerate(packs) if len(pack) > 1]
    divisible.sort(key=lambda index: (int(tokens[packs[index]].sum()), index))
    halved = set(divisible[: num_packs - len(packs)])
    result: list[list[int]] = []
    for index, pack in enumerate(packs):
        result += [pack[::2], pack[1::2]] if index in halved else [pack]
    return result


def _assemble(
    rows: Sequence[Sequence[Sequence[int]]],
    order: NDArray[np.int64],
    samples: NDArray[np.int64],
    tokens: NDArray[np.int64],
    left_out: NDArray[np.int64],
) -> Plan:
    """Interleave the canonical nodes' packs, one of each in turn."""
    longest = max(len(row) for row in rows)
    packs = [row[turn] for turn in range(longest) for row in rows if turn < len(row)]
    positions = np.fromiter((position for pack in packs for position in pack), dtype=np.int64)
    occurrences = order[positions]
    offsets = np.cumsum([0, *map(len, packs)], dtype=np.int64)
    return Plan(occurrences, samples[occurrences], tokens[occurrences], offsets, left_out)


def cached_plan(key: str, make: Callable[[], Plan]) -> Plan:
    """Return the plan kept under `key`, made by the first process of the node that asks.

    The key identifies all data and settings that the plan depends on. If `make` fails, it fails in every process, so
    none waits for it. Plans made by another version of the code are not read: they may differ.
    """
    folder = Path(gettempdir(), f"recipe-plans-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user: remove it, or set TMPDIR to a folder of your own")
    path = folder / f"{key}-{_code_digest()}.npz"
    with FileLock(f"{path}.lock"):
        kept = read_arrays(path)
        if kept is not None:
            return Plan(**kept)
        for old in folder.iterdir():
            with suppress(FileNotFoundError):  # another process may have removed it
                if time.time() - old.stat().st_mtime > _SECONDS_KEPT:
                    old.unlink()
        plan = make()
        write_arrays(path, vars(plan))
        return plan


@cache
def _code_digest() -> str:
    """Return a digest of this package's source and of the libraries that shuffle and draw."""
    digest = sha256(f"numpy {version('numpy')}, streaming {version('mosaicml-streaming')}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
