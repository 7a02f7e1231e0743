"""Which samples share a pack: lengths in, positions out, under a budget of tokens and one of image patches.

A pack starts with the longest sample left, continues with any that fit, and ends with the pair that fits best. Taking
the longest throughout, as textbooks do, groups samples of similar length and leaves similar gaps: samples of 599 to
864 tokens then fill 0.94 of 4,096, and 0.99 this way.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from random import Random

import numpy as np
from jaxtyping import Int

PAIRS_TRIED = 8
GOOD_FILL = 0.98  # samples of emptier packs move to the next window
MOST_DELAYS = 4  # of one sample, so that none strays far from its place in the shuffled order
ENOUGH_FILL = 0.99  # of a window: no other way is tried


# How packs are filled; no way is best for all lengths, so a window may be packed in several.
# (reach, longest first): a pack is closed once it has room for fewer than `reach` samples of medium size; the last pair
# is tried from the longest sample down, or else at random.
WAYS = ((2.7, True), (2.7, False), (3.2, False))


def pack_ordered(
    tokens: Int[np.ndarray, " N"],
    patches: Int[np.ndarray, " N"],
    max_tokens: int,
    max_patches: int | None,
    window: int,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Pack samples in their order, window by window.

    A window's packs are returned in random order, because packing emits long samples first. The samples of badly
    filled packs move to the next window, at most `MOST_DELAYS` times each.

    `tokens` and `patches` are per sample; `max_tokens` and `max_patches` (None: any number) are per pack.

    Returns:
        Packs of ascending positions; every position is in exactly one.
    """
    max_patches = check_budget(tokens, patches, max_tokens, max_patches)
    token_list, patch_list = tokens.tolist(), patches.tolist()
    num_samples = len(token_list)
    packs: list[list[int]] = []
    postponed: list[int] = []
    delays: dict[int, int] = {}
    for start in range(0, num_samples, window):
        stop = min(start + window, num_samples)
        positions = [*postponed, *range(start, stop)]
        some_tokens = [token_list[position] for position in positions]
        some_patches = [patch_list[position] for position in positions]
        done: list[list[int]] = []
        counts, delays, postponed = delays, {}, []
        for fill, pack in _pack_best(some_tokens, some_patches, max_tokens, max_patches):
            members = sorted(positions[index] for index in pack)
            times = max(counts.get(position, 0) for position in members)
            if fill >= GOOD_FILL or times == MOST_DELAYS or stop == num_samples:
                done.append(members)
            else:
                postponed += members
                delays |= {position: counts.get(position, 0) + 1 for position in members}
        packs += [done[index] for index in rng.permutation(len(done))]
    return packs


def _pack_best(
    tokens: Sequence[int], patches: Sequence[int], max_tokens: int, max_patches: int | None
) -> list[tuple[float, list[int]]]:
    """Return the fullest of several packings: (fill, positions) per pack."""
    window = Window(tokens, patches, max_tokens, max_patches)
    best: list[tuple[float, list[int]]] = []
    best_fill = -1.0
    for reach, longest_first in WAYS:
        packs = window.pack(reach, longest_first)
        fills = sorted(fill for fill, _ in packs)[1:]  # without the emptiest, which holds the rest
        # `sum` rounds otherwise from Python 3.12 on.
        mean_fill = float(np.cumsum([0.0, *fills])[-1]) / max(1, len(fills))
        if mean_fill > best_fill:
            best, best_fill = packs, mean_fill
        if best_fill >= ENOUGH_FILL or len(packs) == 1:
            break
    return best


class Window:
    """The samples that are not in a pack yet, as bits of one integer: bit r is the sample of rank r by size.

    A sample's size is the larger of its shares of the two budgets, scaled to an integer. The largest sample that fits
    is then the highest bit of what is left AND what fits the tokens AND what fits the patches.
    """

    def __init__(self, tokens: Sequence[int], patches: Sequence[int], max_tokens: int, max_patches: int | None):
        self._max_tokens, self._max_patches = max_tokens, max_patches
        sizes: Sequence[int] = tokens
        if max_patches is not None:
            sizes = [max(t * max_patches, p * max_tokens) for t, p in zip(tokens, patches, strict=True)]
        self._positions = sorted(range(len(tokens)), key=lambda position: (sizes[position], tokens[position]))
        self._sizes = [sizes[position] for position in self._positions]
        self._tokens = [tokens[position] for position in self._positions]
        self._patches = [patches[position] for position in self._positions]
        # Per rank the first rank of the same size and tokens: a search need not choose between these.
        firsts: dict[tuple[int, int], int] = {}
        alike = zip(self._sizes, self._tokens, strict=True)
        self._first_alike = [firsts.setdefault(kind, rank) for rank, kind in enumerate(alike)]
        if max_patches is not None:
            self._sorted_tokens, self._fit_tokens = _fit_masks(self._tokens)
            self._sorted_patches, self._fit_patches = _fit_masks(self._patches)
        self._left = 0
        self._random = Random(0)

    def pack(self, reach: float, longest_first: bool) -> list[tuple[float, list[int]]]:
        """Return (fill, positions) per pack."""
        self._left = (1 << len(self._positions)) - 1
        self._random = Random(0)
        packs: list[tuple[float, list[int]]] = []
        while self._left:
            pack: list[int] = []
            room, patch_room = self._max_tokens, self._max_patches or 0
            chosen: tuple[int, ...] = (self._left.bit_length() - 1,)
            while chosen:
                for rank in chosen:
                    pack.append(self._positions[rank])
                    self._left ^= 1 << rank
                    room -= self._tokens[rank]
                    patch_room -= self._patches[rank]
                chosen = self._choose(room, patch_room, reach, longest_first)
            fill = 1 - room / self._max_tokens
            if self._max_patches is not None:
                fill = max(fill, 1 - patch_room / self._max_patches)
            packs.append((fill, pack))
        return packs

    def _fitting(self, room: int, patch_room: int) -> int:
        """Return the samples left that fit into `room` tokens and `patch_room` patches."""
        if self._max_patches is None:
            return self._left & ((1 << bisect_right(self._tokens, room)) - 1)
        return (
            self._left
            & self._fit_tokens[bisect_right(self._sorted_tokens, room)]
            & self._fit_patches[bisect_right(self._sorted_patches, patch_room)]
        )

    def _choose(self, room: int, patch_room: int, reach: float, longest_first: bool) -> tuple[int, ...]:
        """Return the next one or two samples of a pack; none if none fits."""
        fitting = self._fitting(room, patch_room)
        if not fitting:
            return ()
        size_room = room
        if self._max_patches is not None:
            size_room = min(room * self._max_patches, patch_room * self._max_tokens)
        if size_room >= reach * self._sizes[_near(fitting, 0.5)]:
            return (_near(fitting, self._random.random()),)
        # The largest of `PAIRS_TRIED` pairs by sum of sizes; or the largest sample, if larger.
        best: tuple[int, ...] = (fitting.bit_length() - 1,)
        best_size = self._sizes[best[0]]
        full = room * (self._max_patches or 1)
        candidates = fitting
        for _ in range(PAIRS_TRIED):
            if best_size >= full or not candidates:
                break
            first = candidates.bit_length() - 1 if longest_first else _near(fitting, self._random.random())
            candidates &= (1 << self._first_alike[first]) - 1 if longest_first else -1
            partners = self._fitting(room - self._tokens[first], patch_room - self._patches[first]) & ~(1 << first)
            if partners:
                second = partners.bit_length() - 1
                size = self._sizes[first] + self._sizes[second]
                if size > best_size:
                    best, best_size = (first, second), size
        return best


def _near(ranks: int, share: float) -> int:
    """Return the highest rank of a set up to a share (in [0, 1)) of the way from its lowest to its highest."""
    highest, lowest = ranks.bit_length() - 1, (ranks & -ranks).bit_length() - 1
    return (ranks & ((2 << lowest + int(share * (highest - lowest + 1))) - 1)).bit_length() - 1


def _fit_masks(values: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the sorted values, and masks of ranks: `masks[bisect_right(sorted, x)]` are those of values up to x."""
    order = sorted(range(len(values)), key=values.__getitem__)
    masks = accumulate(order, lambda mask, rank: mask | 1 << rank, initial=0)
    return [values[rank] for rank in order], list(masks)


def may_exceed_patches(
    tokens: Int[np.ndarray, " N"], patches: Int[np.ndarray, " N"], max_tokens: int, max_patches: int
) -> bool:
    """Return whether a pack within `max_tokens` could exceed `max_patches`."""
    return bool((patches.astype(np.int64) * max_tokens > tokens.astype(np.int64) * max_patches).any())


def check_budget(
    tokens: Int[np.ndarray, " N"], patches: Int[np.ndarray, " N"], max_tokens: int, max_patches: int | None
) -> int | None:
    """Check all samples; return `max_patches`, or None if no pack within `max_tokens` can exceed it."""
    if len(tokens) and tokens.min() < 1:
        raise ValueError(f"the sample at position {int(tokens.argmin())} has {int(tokens.min())} tokens: it needs one")
    for values, budget, noun, option in (
        (tokens, max_tokens, "tokens", "max_seq_len"),
        (patches, max_patches, "image patches", "the patch budget"),
    ):
        if budget is not None and len(values) and values.max() > budget:
            position = int(values.argmax())
            raise ValueError(
                f"the sample at position {position} has {int(values[position])} {noun}, above the {budget} of a pack: "
                f"raise {option} or lower image.max_pixels"
            )
    if max_patches is None or not may_exceed_patches(tokens, patches, max_tokens, max_patches):
        return None
    return max_patches
