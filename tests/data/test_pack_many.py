"""`recipe.data.pack_many`: the packs of `recipe.data.pack`, position for position."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from recipe.data import pack_many
from recipe.data.pack import MOST_DELAYS, pack_ordered
from recipe.data.pack_many import MOST_IN_LANES, CrowdedWindowError, pack_chunks

Lengths = NDArray[np.int64]
MAX_TOKENS = 4096
MIXES: dict[str, Callable[[np.random.Generator, int], Lengths]] = {
    "lognormal": lambda rng, count: rng.lognormal(6.6, 0.45, count).astype(np.int64),
    "few shot": lambda rng, count: (
        rng.lognormal(6.4, 0.4, (count, 4)).cumsum(axis=1)[np.arange(count), rng.integers(0, 4, count)].astype(np.int64)
    ),
    "one camera": lambda rng, count: rng.choice([599, 612, 632, 640, 668, 690, 752, 810, 864], count),
    "all alike": lambda rng, count: np.full(count, 700),
    "short": lambda rng, count: rng.integers(1, 300, count),
    "long, hard to fill": lambda rng, count: rng.integers(1500, MAX_TOKENS + 1, count),
    "one per pack": lambda rng, count: np.full(count, MAX_TOKENS),
}


def rngs(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng([5, chunk]) for chunk in range(count)]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("num_chunks", "num_windows", "window"), [(9, 6, 48), (3, 2, 130), (4, 5, 1), (1, 1, 64)])
@pytest.mark.parametrize("least_lanes", [1, 5])  # with 5, the lanes that try another way soon do so one by one
def test_the_packs_are_those_of_one_chunk_after_the_other(
    mix: str, num_chunks: int, num_windows: int, window: int, least_lanes: int, monkeypatch
):
    monkeypatch.setattr(pack_many, "LEAST_LANES", least_lanes)
    size = num_windows * window
    tokens = MIXES[mix](np.random.default_rng(1), num_chunks * size).clip(1, MAX_TOKENS)
    found = pack_chunks(tokens, num_chunks, MAX_TOKENS, window, rngs(num_chunks))
    for chunk, (rng, (positions, sizes)) in enumerate(zip(rngs(num_chunks), found, strict=True)):
        own = tokens[chunk * size : (chunk + 1) * size]
        packs = pack_ordered(own, np.zeros_like(own), MAX_TOKENS, None, window, rng)
        assert sizes.tolist() == [len(pack) for pack in packs]
        assert positions.tolist() == [position for pack in packs for position in pack]


def test_a_window_is_as_large_as_bits_allow(monkeypatch):
    monkeypatch.setattr(pack_many, "LEAST_LANES", 1)
    tokens = MIXES["lognormal"](np.random.default_rng(2), MOST_IN_LANES)
    ((positions, sizes),) = pack_chunks(tokens, 1, MAX_TOKENS, MOST_IN_LANES, rngs(1))
    packs = pack_ordered(tokens, np.zeros_like(tokens), MAX_TOKENS, None, MOST_IN_LANES, *rngs(1))
    assert positions.tolist() == [position for pack in packs for position in pack]
    assert sizes.sum() == MOST_IN_LANES


def test_windows_that_postpone_too_much_are_refused(monkeypatch):
    monkeypatch.setattr(pack_many, "LEAST_LANES", 1)
    window = MOST_IN_LANES // MOST_DELAYS
    tokens = np.full(6 * window, 2100)  # no two fit, and none fills a pack
    with pytest.raises(CrowdedWindowError, match=f"above {MOST_IN_LANES}"):
        pack_chunks(tokens, 1, MAX_TOKENS, window, rngs(1))


def test_a_sample_that_fits_no_pack_is_named():
    with pytest.raises(ValueError, match=r"position 3 has 11 tokens, above the 10 of a pack"):
        pack_chunks(np.array([5, 5, 5, 11]), 2, 10, 2, rngs(2))
