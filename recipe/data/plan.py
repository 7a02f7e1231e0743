"""The plan of an epoch: which samples share a pack, and the order of packs; kept on this node's disk.

Each canonical node packs its share of the shuffled order in chunks of `WINDOWS_PER_CHUNK` windows that do not depend on
each other, so that many, of all nodes, are packed at once. A chunk ends with up to two packs that are not full, of some
5,000.

Versions before December 2026 packed a share as one chunk. Shares of up to one chunk have the same plan as then. A
checkpoint of a larger set, saved within an epoch, continues that epoch with the old plan (`is_divided=False`).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from jaxtyping import Bool, Int
from numpy.typing import NDArray

from recipe.data.mapped import hashed, map_arrays, node_folder, remove_old_files, small_ints, write_mapped
from recipe.data.pack import may_exceed_patches, pack_ordered
from recipe.data.pack_many import LEAST_LANES, MOST_IN_LANES, CrowdedWindowError, pack_chunks

log = logging.getLogger(__name__)

WINDOWS_PER_CHUNK = 24
_MOST_LANES = 512  # at 4,096 tokens per pack; bounds the memory

_PURPOSE = 2  # separates the generators of packs from those of Streaming's shuffle, which have the same seeds

Ints = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True)
class Budget:
    """What a pack may hold."""

    max_tokens: int  # of all its conversations
    max_patches: int | None  # of all its images; None: any number
    window: int  # samples, in shuffled order, that are packed together
    max_seq_len: int | None = None  # tokens of one sample; None: as many as a pack

    def fits(self, tokens: Int[np.ndarray, " S"], patches: Int[np.ndarray, " S"]) -> Bool[np.ndarray, " S"]:
        """Return which samples are within the budget alone."""
        max_tokens = min(self.max_tokens, self.max_seq_len or self.max_tokens)
        return (tokens <= max_tokens) & (self.max_patches is None or patches <= self.max_patches)


@dataclass(frozen=True)
class Plan:
    """The packs of one epoch, in order; pack p holds entries `offsets[p]` to `offsets[p + 1]`.

    Samples are numbers of 32 bits if these suffice.
    """

    occurrences: Int[np.ndarray, " S"]  # the epoch's samples by their place before the shuffle
    samples: Int[np.ndarray, " S"]  # their positions in the stored data: `occurrences` itself without resampling
    tokens: Int[np.ndarray, " S"]  # their planned tokens; 0 if lengths are unknown
    offsets: Int[np.ndarray, " ends"]  # P + 1
    left_out: Int[np.ndarray, " K"]  # the stored positions of occurrences too large for any pack

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
        return hashed(vars(self).values()).hexdigest()[:16]


def plan_samples(
    order: Int[np.ndarray, " used"], samples: Int[np.ndarray, " S"] | None, num_canonical_nodes: int
) -> Plan:
    """Return a plan with one sample per pack, for training without packing; arguments as of `plan_packs`."""
    order = small_ints(order, int(order.max(initial=0)))
    sizes = [np.ones(len(row), dtype=np.int32) for row in _rows(order, num_canonical_nodes)]
    none = np.empty(0, dtype=np.int64)
    return _assemble(order, sizes, samples, tokens=None, left_out=none)


def plan_packs(
    order: Int[np.ndarray, " used"],
    samples: Int[np.ndarray, " S"] | None,
    tokens: Int[np.ndarray, " S"],
    patches: Int[np.ndarray, " S"],
    num_canonical_nodes: int,
    budget: Budget,
    seed: int,
    epoch: int,
    is_divided: bool = True,
) -> Plan:
    """Pack each canonical node's share of the order, so that a node keeps reading its own shards.

    `order` holds the epoch's occurrences, shuffled; those over the budget alone are left out. An int32 `order` is
    changed in place, which saves a copy. `samples`, `tokens` and `patches` hold the stored position of each occurrence
    and its lengths, including its teachers; without resampling `samples` is None. `is_divided=False` packs a share as
    one chunk.
    """
    fits = budget.fits(tokens, patches)
    left_out = np.empty(0, dtype=np.int64)
    if not fits.all():
        fits = fits[order]
        left_out = np.sort(order[~fits])
        left_out, order = left_out if samples is None else samples[left_out], order[fits]
    del fits
    order = small_ints(order, len(tokens))  # each share is put into the order of its packs
    shares = _rows(order, num_canonical_nodes)
    chunks = [_chunks(row, budget, [seed, epoch, node, _PURPOSE], is_divided) for node, row in enumerate(shares)]
    of_chunks = iter(_pack_in_place(order, [*chain(*chunks)], tokens, patches, budget))
    sizes = [np.concatenate([next(of_chunks) for _ in own]) for own in chunks]
    num_packs = max(map(len, sizes))
    for node, row in enumerate(shares):
        sizes[node] = _split_emptiest(order[row.start : row.stop], sizes[node], num_packs, tokens)
    return _assemble(order, sizes, samples, tokens, left_out)


@dataclass(frozen=True)
class _Chunk:
    entries: slice  # of the order
    key: list[int]  # seeds its generator


def _chunks(share: range, budget: Budget, key: list[int], is_divided: bool) -> list[_Chunk]:
    """Return the chunks of a node's share, the last of which may be shorter; one if it is not divided."""
    size = budget.window * WINDOWS_PER_CHUNK if is_divided else max(1, len(share))
    starts = range(share.start, max(share.stop, share.start + 1), size)
    return [
        _Chunk(slice(start, min(start + size, share.stop)), [*key, number] if number else key)
        for number, start in enumerate(starts)
    ]


def _pack_in_place(
    order: Ints, chunks: Sequence[_Chunk], tokens: Ints, patches: Ints, budget: Budget
) -> list[NDArray[np.int32]]:
    """Put chunks of the order into the order of their packs; return the samples of each pack, by chunk."""
    sizes = [np.empty(0, dtype=np.int32)] * len(chunks)
    for places in _groups(chunks, budget):
        own = np.concatenate([order[chunks[place].entries] for place in places])
        of_own = None if budget.max_patches is None else patches[own]
        packed = _pack_group(tokens[own], of_own, budget, [chunks[place].key for place in places])
        for place, (positions, counts) in zip(places, packed, strict=True):
            entries = chunks[place].entries
            order[entries] = order[entries][positions]
            sizes[place] = counts.astype(np.int32)
    return sizes


def _groups(chunks: Sequence[_Chunk], budget: Budget) -> Iterator[list[int]]:
    """Yield the places of chunks that are packed together: many of the whole size, of any nodes, or one."""
    size = budget.window * WINDOWS_PER_CHUNK
    whole = [place for place, chunk in enumerate(chunks) if chunk.entries.stop - chunk.entries.start == size]
    most = max(LEAST_LANES, _MOST_LANES * 4096 // max(4096, budget.max_tokens))
    alone = set(range(len(chunks)))
    for start in range(0, len(whole), most):
        group = whole[start : start + most]
        if len(group) >= LEAST_LANES and budget.window <= MOST_IN_LANES:
            alone -= set(group)
            yield group
    yield from ([place] for place in sorted(alone))


def _pack_group(
    tokens: Ints, patches: Ints | None, budget: Budget, keys: Sequence[list[int]]
) -> Sequence[tuple[Ints, Ints]]:
    """Return of each of some equal chunks its positions, pack by pack, and the samples of each pack; `keys` seed."""
    most = budget.max_patches
    only_tokens = patches is None or most is None or not may_exceed_patches(tokens, patches, budget.max_tokens, most)
    if len(keys) > 1 and only_tokens:
        rngs = [*map(np.random.default_rng, keys)]
        with suppress(CrowdedWindowError):  # then one after the other, from the generators' beginning
            return pack_chunks(tokens, len(keys), budget.max_tokens, budget.window, rngs)
    size, found = len(tokens) // len(keys), []
    for chunk, key in enumerate(keys):
        own = slice(chunk * size, (chunk + 1) * size)
        of_own = np.zeros_like(tokens[own]) if patches is None else patches[own]
        rng = np.random.default_rng(key)
        packs = pack_ordered(tokens[own], of_own, budget.max_tokens, budget.max_patches, budget.window, rng)
        positions = np.fromiter((position for pack in packs for position in pack), dtype=np.int64)
        found.append((positions, np.array([len(pack) for pack in packs], dtype=np.int64)))
    return found


def assign_packs(
    num_packs: int, first: int, num_nodes: int, ranks_per_node: int
) -> Int[np.ndarray, "{num_nodes} {ranks_per_node} packs"]:
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
    packs: Int[np.ndarray, " packs"], worker: int, num_workers: int, batch_size: int
) -> Int[np.ndarray, " own"]:
    """Return a loader worker's packs of a rank: every `num_workers`-th batch, as the DataLoader collects them."""
    return packs[np.arange(len(packs)) // batch_size % num_workers == worker]


def _rows(order: Ints, num_canonical_nodes: int) -> list[range]:
    """Return the share of each canonical node, as Streaming's partition cuts them."""
    ends = [len(order) * node // num_canonical_nodes for node in range(num_canonical_nodes + 1)]
    return [range(start, end) for start, end in pairwise(ends)]


def _split_emptiest(share: Ints, sizes: Ints, num_packs: int, tokens: Ints) -> Ints:
    """Halve the emptiest packs of two or more samples, in place, until there are `num_packs`, if there are enough.

    Nodes with equally many packs read in step. Moving whole packs between nodes read a third more shards (measured).
    """
    if len(sizes) == num_packs:
        return sizes
    starts = np.cumsum(sizes) - sizes
    filled = np.add.reduceat(tokens[share], starts, dtype=np.int64)
    divisible = np.flatnonzero(sizes > 1)
    halved = divisible[np.argsort(filled[divisible], kind="stable")[: num_packs - len(sizes)]]
    # The samples of these packs: those at even places come first.
    pack_of = np.repeat(np.arange(len(halved)), sizes[halved])
    place = np.arange(len(pack_of)) - np.repeat(np.cumsum(sizes[halved]) - sizes[halved], sizes[halved])
    entries = starts[halved][pack_of] + place
    share[entries] = share[entries[np.argsort(2 * pack_of + place % 2, kind="stable")]]
    halves = np.stack([sizes, np.zeros_like(sizes)], axis=1)
    halves[halved] = np.stack([(sizes[halved] + 1) // 2, sizes[halved] // 2], axis=1)
    return halves[halves > 0]


def _assemble(order: Ints, sizes: Sequence[Ints], samples: Ints | None, tokens: Ints | None, left_out: Ints) -> Plan:
    """Return the plan whose `order` has the share of one canonical node after the other, in packs of `sizes`."""
    occurrences, of_packs = _interleave(order, sizes)
    offsets = np.zeros(len(of_packs) + 1, dtype=np.int64)
    np.cumsum(of_packs, out=offsets[1:])
    planned = np.zeros(len(occurrences), dtype=np.int32) if tokens is None else tokens[occurrences]
    positions = occurrences if samples is None else samples[occurrences]
    return Plan(occurrences, positions, planned, offsets, left_out)


def _interleave(order: Ints, sizes: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Return the order with one pack of each node in turn, and the samples of each pack."""
    if len(sizes) == 1:
        return order, sizes[0]
    turns = np.zeros((max(map(len, sizes)), len(sizes)), dtype=np.int32)  # 0: a node has no pack left
    for row, own in enumerate(sizes):
        turns[: len(own), row] = own
    starts = np.cumsum(turns, dtype=np.int64).reshape(turns.shape)
    starts -= turns
    interleaved, first = np.empty_like(order), 0
    for row, own in enumerate(sizes):
        places = np.repeat(starts[: len(own), row] - np.cumsum(own, dtype=np.int64) + own, own)
        places += np.arange(len(places))
        interleaved[places] = order[first : first + len(places)]
        first += len(places)
    return interleaved, turns[turns > 0]


def cached_plan(key: str, make: Callable[[], Plan]) -> Plan:
    """Return the plan kept under `key`, made by the first process of the node that asks.

    Its arrays are mapped: the processes of a node share their memory.

    The key identifies all data and settings that the plan depends on. If `make` fails, it fails in every process, so
    none waits for it; if the disk takes no plan, each process makes and holds its own. Plans made by another version of
    the code are not read: they may differ.
    """
    folder = node_folder()
    path = folder / f"{key}-{_code_digest()}.npz"
    with FileLock(f"{path}.lock"):
        kept = _read_plan(path)
        if kept is not None:
            return kept
        remove_old_files(folder)
        plan = make()
        try:
            arrays = vars(plan)
            if plan.samples is plan.occurrences:
                arrays = {name: array for name, array in arrays.items() if name != "samples"}
            write_mapped(path, arrays)
        except OSError as error:
            log.warning("the plan is not kept in %s (%s): each process makes and holds its own", folder, error)
            return plan
        return _read_plan(path) or plan  # so that this process, too, shares the memory


def _read_plan(path: Path) -> Plan | None:
    arrays = map_arrays(path)
    return None if arrays is None else Plan(**{"samples": arrays["occurrences"], **arrays})


@cache
def _code_digest() -> str:
    """Return a digest of this package's source and of the libraries that shuffle and draw."""
    digest = sha256(f"numpy {version('numpy')}, streaming {version('mosaicml-streaming')}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
