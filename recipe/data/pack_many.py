"""The packs of `recipe.data.pack` for many chunks at once: the same packs, several times as fast.

Chunks do not depend on each other, so each step of the packer is made in all of them by one call of numpy. A chunk is a
*lane*: a row of the arrays below. Only the budget of tokens is known here.
"""

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

import numpy as np
from jaxtyping import Float64, Int, Int64
from numpy.typing import NDArray

from recipe.data.pack import ENOUGH_FILL, GOOD_FILL, MOST_DELAYS, PAIRS_TRIED, WAYS, Window, check_budget

_WORD = 32  # bits
_MOST_WORDS = 52  # a float64 holds any number of that size exactly
LEAST_LANES = 100  # fewer are faster one after the other
MOST_IN_LANES = _MOST_WORDS * _WORD - 1  # samples of a window, with those postponed by the one before
_LOW_BITS = (np.int64(1) << np.arange(64, dtype=np.int64)) - 1

Ints = NDArray[np.int64]


class CrowdedWindowError(ValueError):
    """A window has too many samples, since most of those before it were postponed."""


class _Ranks:
    """A set of ranks per lane, as words of bits and a word that says which words have any."""

    def __init__(self, counts: Ints):
        """Put the ranks below `counts` (L,) into the sets."""
        self._num_words = int(counts.max()) // _WORD + 1
        if self._num_words > _MOST_WORDS:
            raise CrowdedWindowError(f"a window has {int(counts.max())} samples, above {MOST_IN_LANES}")
        left = counts[:, None] - _WORD * np.arange(self._num_words)
        self._words = _LOW_BITS[np.clip(left, 0, _WORD)].reshape(-1)
        self._filled = ((left > 0).astype(np.int64) << np.arange(self._num_words)).sum(axis=1)

    def below(self, lanes: Ints, ranks: Ints) -> Ints:
        """Return the highest member below each of some lanes' `ranks`; a negative number if there is none."""
        word = ranks >> 5
        base = lanes * self._num_words
        bits = self._words.take(base + word) & _LOW_BITS.take(ranks & 31)
        others = _highest_bit(self._filled.take(lanes) & _LOW_BITS.take(word))
        is_other = bits == 0
        word = np.where(is_other, others, word)
        bits = np.where(is_other, self._words.take(base + others, mode="wrap"), bits)  # none: another lane's, unused
        return (word << 5) + _highest_bit(bits)

    def remove(self, lanes: Ints, ranks: Ints) -> None:
        """Remove one member from each of some lanes."""
        word = ranks >> 5
        place = lanes * self._num_words + word
        bits = self._words[place] & ~(np.int64(1) << (ranks & 31))
        self._words[place] = bits
        self._filled[lanes] &= ~((bits == 0).astype(np.int64) << word)

    def lowest(self, lanes: Ints) -> Ints:
        """Return the lowest member of some lanes, which have one."""
        filled = self._filled.take(lanes)
        word = _highest_bit(filled & -filled)
        bits = self._words.take(lanes * self._num_words + word)
        return (word << 5) + _highest_bit(bits & -bits)


def _highest_bit(values: Ints) -> NDArray[np.int32]:
    """Return the position of the highest bit of numbers below 2^53; -1 of 0."""
    return np.frexp(values)[1] - 1


class _Lanes:
    """A window of each lane: its samples sorted by tokens, and the packs of one way to fill them."""

    def __init__(self, tokens: Int64[np.ndarray, "L n"], counts: Int64[np.ndarray, " L"], max_tokens: int):
        """Take rows of rising tokens; those from `counts` on are over `max_tokens` and not samples."""
        self._counts, self._max_tokens, self._width = counts, max_tokens, tokens.shape[1]
        self._tokens = tokens.reshape(-1)
        # How many samples of a lane have up to each number of tokens.
        self._fit = np.cumsum(_count(tokens, max_tokens + 2), axis=1, dtype=np.int16).reshape(-1)
        is_new = np.ones(tokens.shape, dtype=np.bool_)
        is_new[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
        ranks = np.arange(self._width)
        self._first_alike = np.maximum.accumulate(np.where(is_new, ranks, 0), axis=1).reshape(-1)
        self._left = _Ranks(counts)
        self._room = np.zeros(len(tokens), dtype=np.int64)
        self._number = np.full(len(tokens), -1)
        self._drawn = np.zeros(len(tokens), dtype=np.int64)
        self._pack_of = np.full(tokens.size, -1)

    def pack(self, reach: float, longest_first: bool) -> Int64[np.ndarray, "L n"]:
        """Return the number of each sample's pack; -1 where there is no sample."""
        closed, choosing = np.arange(len(self._counts)), np.empty(0, dtype=np.int64)
        waiting: list[tuple[Ints, Ints, Ints]] = []  # lanes that end their packs, with the range of what fits
        num_waiting = 0
        while len(closed) or len(choosing) or waiting:
            if len(closed):
                first = self._left.below(closed, self._counts.take(closed))
                closed, first = closed[first >= 0], first[first >= 0]
                self._number[closed] += 1
                self._room[closed] = self._max_tokens
                self._take(closed, first)
                choosing = np.concatenate([choosing, closed])
            high = self._left.below(choosing, self._fitting(choosing, self._room.take(choosing)))
            closed, choosing, high = choosing[high < 0], choosing[high >= 0], high[high >= 0]
            low = self._left.lowest(choosing)
            span = high - low + 1
            middle = self._left.below(choosing, low + (span >> 1) + 1)
            stays_open = self._room.take(choosing) >= reach * self._tokens_of(choosing, middle)
            if not stays_open.all():
                ends = ~stays_open
                waiting.append((choosing[ends], low[ends], high[ends]))
                num_waiting += len(waiting[-1][0])
            choosing = choosing[stays_open]
            self._take(choosing, self._at_random(choosing, low[stays_open], span[stays_open]))
            # A pair takes many calls, so they are made once three of four lanes wait.
            if waiting and num_waiting >= 3 * (len(choosing) + len(closed)):
                lanes, low, high = (np.concatenate(parts) for parts in zip(*waiting, strict=True))
                self._take_pair(lanes, low, high, longest_first)
                choosing, waiting, num_waiting = np.concatenate([choosing, lanes]), [], 0
        return self._pack_of.reshape(-1, self._width)

    def _tokens_of(self, lanes: Ints, ranks: Ints) -> Ints:
        return self._tokens.take(lanes * self._width + ranks)

    def _fitting(self, lanes: Ints, room: Ints) -> Ints:
        """Return how many samples of lanes have at most `room` tokens, taken or not."""
        return self._fit.take(lanes * (self._max_tokens + 2) + room).astype(np.int64)

    def _at_random(self, lanes: Ints, low: Ints, span: Ints) -> Ints:
        """Return the member up to a random share of the way through a range of ranks, which begins with a member."""
        shares = _random_numbers(int(self._drawn.max()) + 1).take(self._drawn.take(lanes))
        self._drawn[lanes] += 1
        return self._left.below(lanes, low + (shares * span).astype(np.int64) + 1)

    def _take(self, lanes: Ints, ranks: Ints) -> None:
        self._left.remove(lanes, ranks)
        place = lanes * self._width + ranks
        self._pack_of[place] = self._number.take(lanes)
        self._room[lanes] -= self._tokens.take(place)

    def _take_pair(self, lanes: Ints, low: Ints, high: Ints, longest_first: bool) -> None:
        """Take the largest of `PAIRS_TRIED` pairs; or the largest sample, if larger."""
        room, best_size = self._room.take(lanes), self._tokens_of(lanes, high)
        best, partner = high, np.full(len(lanes), -1)
        first, is_tried = high, np.ones(len(lanes), dtype=np.bool_)
        for turn in range(PAIRS_TRIED):
            is_tried &= best_size < room
            if not longest_first:
                tried = np.flatnonzero(is_tried)
                first = first.copy()
                first[tried] = self._at_random(lanes[tried], low[tried], (high - low)[tried] + 1)
            elif turn:
                first = self._left.below(lanes, self._first_alike.take(lanes * self._width + first))
                is_tried &= first >= 0
                first = np.maximum(first, 0)
            if not is_tried.any():
                break
            size = self._tokens_of(lanes, first)
            second = self._left.below(lanes, self._fitting(lanes, np.maximum(room - size, 0)))
            second = np.where(second == first, self._left.below(lanes, first), second)
            size = size + self._tokens_of(lanes, np.maximum(second, 0))
            is_better = is_tried & (second >= 0) & (size > best_size)
            best, partner = np.where(is_better, first, best), np.where(is_better, second, partner)
            best_size = np.where(is_better, size, best_size)
        self._take(lanes, best)
        has_partner = partner >= 0
        self._take(lanes[has_partner], partner[has_partner])


@cache
def _numbers(count: int) -> NDArray[np.float64]:
    generator = Random(0)
    return np.array([generator.random() for _ in range(count)])


def _random_numbers(count: int) -> NDArray[np.float64]:
    """Return at least `count` of the numbers that a window draws."""
    return _numbers(1 << max(10, count.bit_length()))


def _count(values: Int64[np.ndarray, "L n"], most: int) -> Int64[np.ndarray, "L most"]:
    """Return how often each number below `most` is in each row."""
    rows = most * np.arange(len(values))[:, None]
    return np.bincount((rows + values).reshape(-1), minlength=len(values) * most).reshape(len(values), most)


def _one_by_one(tokens: Ints, counts: Ints, max_tokens: int, reach: float, longest_first: bool) -> Ints:
    """Return what `_Lanes.pack` does, by the packer of one window."""
    pack_of = np.full(tokens.shape, -1)
    for row, own, count in zip(pack_of, tokens, counts.tolist(), strict=True):
        window = Window(own[:count].tolist(), [0] * count, max_tokens, None)
        for number, (_, members) in enumerate(window.pack(reach, longest_first)):
            row[members] = number
    return pack_of


def _pack_windows(
    sizes: Int64[np.ndarray, "L n"], counts: Int64[np.ndarray, " L"], max_tokens: int
) -> tuple[Int64[np.ndarray, "L n"], Float64[np.ndarray, "L n"]]:
    """Return the pack of each sample of the fullest of several packings, -1 where there is none, and packs' fills.

    `sizes` are the samples' tokens; above `max_tokens` where there is no sample.
    """
    ranks = np.argsort(sizes, axis=1, kind="stable")
    tokens = np.take_along_axis(sizes, ranks, axis=1)
    best, best_fills = np.full(sizes.shape, -1), np.zeros(sizes.shape)
    best_mean = np.full(len(sizes), -1.0)
    tried = np.arange(len(sizes))
    for reach, longest_first in WAYS:
        if len(tried) >= LEAST_LANES:
            packs = _Lanes(tokens[tried], counts[tried], max_tokens).pack(reach, longest_first)
        else:
            packs = _one_by_one(tokens[tried], counts[tried], max_tokens, reach, longest_first)
        num_packs, width = packs.max(axis=1) + 1, sizes.shape[1]
        places = width * np.arange(len(tried))[:, None] + packs
        is_there = packs >= 0
        used = np.bincount(places[is_there], tokens[tried][is_there], minlength=packs.size).reshape(packs.shape)
        fills = 1 - (max_tokens - used) / max_tokens
        rising = np.sort(np.where(np.arange(width) < num_packs[:, None], fills, np.inf), axis=1)
        rising[:, 0] = 0  # without the emptiest, which holds the rest
        sums = np.cumsum(rising, axis=1)[np.arange(len(tried)), num_packs - 1]
        means = sums / np.maximum(1, num_packs - 1)
        is_better = means > best_mean[tried]
        better = tried[is_better]
        best[better], best_fills[better], best_mean[better] = packs[is_better], fills[is_better], means[is_better]
        tried = tried[(best_mean[tried] < ENOUGH_FILL) & (num_packs > 1)]
        if not len(tried):
            break
    pack_of = np.empty_like(best)
    np.put_along_axis(pack_of, ranks, best, axis=1)
    return pack_of, best_fills


def pack_chunks(
    tokens: Int[np.ndarray, " N"], num_chunks: int, max_tokens: int, window: int, rngs: Sequence[np.random.Generator]
) -> list[tuple[Int[np.ndarray, " n"], Int[np.ndarray, " packs"]]]:
    """Pack equal chunks of whole windows; `rngs` are theirs.

    Returns:
        Per chunk its positions in it, pack by pack, and the samples of each pack: the packs of `pack_ordered`.

    Raises:
        CrowdedWindowError: A window with those postponed has more than `MOST_IN_LANES` samples.
    """
    chunks = tokens.reshape(num_chunks, -1)
    check_budget(tokens, np.zeros_like(tokens), max_tokens, None)
    lanes, size = np.arange(num_chunks), chunks.shape[1]
    found: list[list[tuple[NDArray[Any], NDArray[Any]]]] = [[] for _ in rngs]
    postponed = np.full((num_chunks, 0), -1)
    delays = np.zeros((num_chunks, 0), dtype=np.int64)
    for start in range(0, size, window):
        new = np.broadcast_to(np.arange(start, start + window), (num_chunks, window))
        positions = np.concatenate([postponed, new], axis=1)  # (C, n); -1: none
        delays = np.concatenate([delays, np.zeros((num_chunks, window), dtype=np.int64)], axis=1)
        is_there = positions >= 0
        sizes = np.where(is_there, chunks[lanes[:, None], positions], max_tokens + 1).astype(np.int64)
        pack_of, fills = _pack_windows(sizes, is_there.sum(axis=1), max_tokens)
        num_packs = pack_of.max(axis=1) + 1
        times = np.zeros(fills.shape, dtype=np.int64)
        np.maximum.at(times, (lanes[:, None], pack_of), delays)  # those of no pack have none
        is_kept = (fills >= GOOD_FILL) | (times == MOST_DELAYS) | (start + window == size)
        is_kept &= np.arange(fills.shape[1]) < num_packs[:, None]
        # Each pack's place: the kept ones in random order, then the postponed ones as they were made.
        places = np.argsort(np.argsort(~is_kept, axis=1, kind="stable"), axis=1)
        for lane, rng in enumerate(rngs):
            kept = np.flatnonzero(is_kept[lane])
            places[lane, kept[rng.permutation(len(kept))]] = np.arange(len(kept))
        is_last = np.where(is_there, places[lanes[:, None], pack_of], positions.shape[1])
        order = np.lexsort((positions, is_last), axis=1)
        positions = np.take_along_axis(positions, order, axis=1)
        delays = np.take_along_axis(delays, order, axis=1)
        pack_of = np.take_along_axis(pack_of, order, axis=1)
        counts = _count(np.where(positions < 0, fills.shape[1], pack_of), fills.shape[1] + 1)[:, :-1]
        num_kept = np.where(is_kept, counts, 0).sum(axis=1)
        for lane, of_chunk in enumerate(found):
            by_place = counts[lane, np.argsort(places[lane])]
            of_chunk.append((positions[lane, : num_kept[lane]].astype(np.int32), by_place[: is_kept[lane].sum()]))
        left = num_kept[:, None] + np.arange(int((counts.sum(axis=1) - num_kept).max()))
        is_left = left < counts.sum(axis=1)[:, None]
        left = np.minimum(left, positions.shape[1] - 1)
        postponed = np.where(is_left, np.take_along_axis(positions, left, axis=1), -1)
        delays = np.where(is_left, np.take_along_axis(delays, left, axis=1) + 1, 0)
    return [
        (np.concatenate([part for part, _ in of_chunk]), np.concatenate([part for _, part in of_chunk]))
        for of_chunk in found
    ]
