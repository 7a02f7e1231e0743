"""The plan of an epoch: which samples share a pack, and the order of packs; kept on this node's disk.

Each canonical node packs its share of the shuffled order in chunks of `WINDOWS_PER_CHUNK` windows that do not depend on
each other, so that many are packed at once. A chunk ends with up to two packs that are not full, of some 5,000.

Versions before December 2026 packed a share as one chunk. Shares of up to one chunk have the same plan as then. A
checkpoint of a larger set, saved within an epoch, continues that epoch with the old plan (`is_divided=False`).
"""

import logging
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

from recipe.data.mapped import map_arrays, write_mapped
from recipe.data.pack import pack_ordered
from recipe.data.pack_many import LEAST_LANES, MOST_IN_LANES, CrowdedWindowError, pack_chunks

log = logging.getLogger(__name__)

WINDOWS_PER_CHUNK = 24
_MOST_LANES = 1024  # at 4,096 tokens per pack; bounds the memory

_PURPOSE = 2  # separates the generators of packs from those of Streaming's shuffle, which have the same seeds
_SECONDS_KEPT = 24 * 3600

Ints = NDArray[np.int64]


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

    def binds_patches(self, tokens: Int64[np.ndarray, " S"], patches: Int64[np.ndarray, " S"]) -> bool:
        """Return whether a pack within `max_tokens` could exceed `max_patches`."""
        most = self.max_patches
        return most is not None and bool((patches * self.max_tokens > tokens * most).any())


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
    rows = [
        (np.arange(row.start, row.stop), np.ones(len(row), dtype=np.int64)) for row in _rows(order, num_canonical_nodes)
    ]
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
    is_divided: bool = True,
) -> Plan:
    """Pack each canonical node's share of the order, so that a node keeps reading its own shards.

    `order` holds the epoch's occurrences, shuffled; those over the budget alone are left out. `samples`, `tokens` and
    `patches` hold the stored position of each occurrence and its lengths, including its teachers. `is_divided=False`
    packs a share as one chunk.
    """
    fits = budget.fits(tokens, patches)
    left_out = np.empty(0, dtype=np.int64)
    if not fits.all():
        left_out = samples[np.sort(order[~fits[order]])]
        order = order[fits[order]]
    tokens_in_order = tokens[order]
    patches_in_order = None if budget.max_patches is None else patches[order]
    rows = []
    for node, row in enumerate(_rows(order, num_canonical_nodes)):
        share = slice(row.start, row.stop)
        of_share = None if patches_in_order is None else patches_in_order[share]
        key = [seed, epoch, node, _PURPOSE]
        positions, sizes = _pack_share(tokens_in_order[share], of_share, budget, key, is_divided)
        positions += row.start
        rows.append((positions, sizes))
    num_packs = max(len(sizes) for _, sizes in rows)
    rows = [_split_emptiest(*row, num_packs, tokens_in_order) for row in rows]
    return _assemble(rows, order, samples, tokens, left_out)


def _pack_share(
    tokens: Ints, patches: Ints | None, budget: Budget, key: list[int], is_divided: bool
) -> tuple[Ints, Ints]:
    """Return the positions of a node's share, pack by pack, and the samples of each pack; `key` seeds."""
    size = budget.window * WINDOWS_PER_CHUNK if is_divided else max(1, len(tokens))
    num_chunks = max(1, -(-len(tokens) // size))

    def rng(chunk: int) -> np.random.Generator:
        return np.random.default_rng([*key, chunk] if chunk else key)

    found: list[tuple[Ints, Ints]] = []
    if budget.window <= MOST_IN_LANES and (patches is None or not budget.binds_patches(tokens, patches)):
        most = max(LEAST_LANES, _MOST_LANES * 4096 // max(4096, budget.max_tokens))
        whole = len(tokens) // size  # the last chunk may be shorter
        with suppress(CrowdedWindowError):  # the rest is packed one chunk after the other
            while whole - len(found) >= LEAST_LANES:
                chunks = range(len(found), min(len(found) + most, whole))
                part = tokens[chunks.start * size : chunks.stop * size]
                found += pack_chunks(part, len(chunks), budget.max_tokens, budget.window, [*map(rng, chunks)])
    for chunk in range(len(found), num_chunks):
        part = slice(chunk * size, (chunk + 1) * size)
        own = np.zeros_like(tokens[part]) if patches is None else patches[part]
        packs = pack_ordered(tokens[part], own, budget.max_tokens, budget.max_patches, budget.window, rng(chunk))
        positions = np.fromiter((position for pack in packs for position in pack), dtype=np.int64)
        found.append((positions, np.array([len(pack) for pack in packs], dtype=np.int64)))
    for chunk, (positions, _) in enumerate(found):
        positions += chunk * size
    return np.concatenate([positions for positions, _ in found]), np.concatenate([sizes for _, sizes in found])


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


def _rows(order: Ints, num_canonical_nodes: int) -> list[range]:
    """Return the share of each canonical node, as Streaming's partition cuts them."""
    ends = [len(order) * node // num_canonical_nodes for node in range(num_canonical_nodes + 1)]
    return [range(start, end) for start, end in pairwise(ends)]


def _split_emptiest(positions: Ints, sizes: Ints, num_packs: int, tokens: Ints) -> tuple[Ints, Ints]:
    """Halve the emptiest packs of two or more samples until there are `num_packs`, if there are enough.

    Nodes with equally many packs read in step. Moving whole packs between nodes read a third more shards (measured).
    """
    if len(sizes) == num_packs:
        return positions, sizes
    pack_of = np.repeat(np.arange(len(sizes)), sizes)
    filled = np.bincount(pack_of, tokens[positions], minlength=len(sizes))
    divisible = np.flatnonzero(sizes > 1)
    divisible = divisible[np.argsort(filled[divisible], kind="stable")]
    is_halved = np.zeros(len(sizes), dtype=np.bool_)
    is_halved[divisible[: num_packs - len(sizes)]] = True
    place = np.arange(len(positions)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    order = np.argsort(2 * pack_of + (is_halved[pack_of] & (place % 2 == 1)), kind="stable")
    halves = np.stack([np.where(is_halved, (sizes + 1) // 2, sizes), np.where(is_halved, sizes // 2, 0)], axis=1)
    return positions[order], halves[halves > 0]


def _assemble(rows: Sequence[tuple[Ints, Ints]], order: Ints, samples: Ints, tokens: Ints, left_out: Ints) -> Plan:
    """Interleave the canonical nodes' packs, one of each in turn; a row has positions and the samples of each pack."""
    positions, sizes = rows[0]
    if len(rows) > 1:
        positions, sizes = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        turns = [len(rows) * np.arange(len(own)) + row for row, (_, own) in enumerate(rows)]
        packs = np.argsort(np.concatenate(turns))
        starts, sizes = (np.cumsum(sizes) - sizes)[packs], sizes[packs]
        ends = np.cumsum(sizes)
        positions = positions[np.arange(len(positions)) + np.repeat(starts - ends + sizes, sizes)]
    occurrences = order[positions]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Plan(occurrences, samples[occurrences], tokens[occurrences], offsets, left_out)


def cached_plan(key: str, make: Callable[[], Plan]) -> Plan:
    """Return the plan kept under `key`, made by the first process of the node that asks.

    Its arrays are mapped: the processes of a node share their memory.

    The key identifies all data and settings that the plan depends on. If `make` fails, it fails in every process, so
    none waits for it; if the disk takes no plan, each process makes and holds its own. Plans made by another version of
    the code are not read: they may differ.
    """
    folder = Path(gettempdir(), f"recipe-plans-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user: remove it, or set TMPDIR to a folder of your own")
    path = folder / f"{key}-{_code_digest()}.npz"
    with FileLock(f"{path}.lock"):
        kept = map_arrays(path)
        if kept is not None:
            return Plan(**kept)
        for old in folder.iterdir():
            with suppress(FileNotFoundError):  # another process may have removed it
                if time.time() - old.stat().st_mtime > _SECONDS_KEPT:
                    old.unlink()
        plan = make()
        try:
            write_mapped(path, vars(plan))
        except OSError as error:
            log.warning("the plan is not kept in %s (%s): each process makes and holds its own", folder, error)
            return plan
        kept = map_arrays(path)  # so that this process, too, shares the memory
        return plan if kept is None else Plan(**kept)


@cache
def _code_digest() -> str:
    """Return a digest of this package's source and of the libraries that shuffle and draw."""
    digest = sha256(f"numpy {version('numpy')}, streaming {version('mosaicml-streaming')}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
