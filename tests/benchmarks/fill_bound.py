"""Compute a fill that no packer can exceed, from the linear programme of Gilmore and Gomory (1961)."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

UNIT = 32


def fill_bound(lengths: NDArray[np.int64], max_tokens: int) -> float:
    """Return the fill of the best packing, or more: lengths are rounded down to `UNIT`, and packs may be cut in parts.

    Args:
        lengths: (N,) tokens of each sample.
        max_tokens: Of a pack.
    """
    sizes, counts = np.unique(np.maximum(lengths // UNIT, 1), return_counts=True)
    capacity = max_tokens // UNIT
    patterns = np.diag((capacity // sizes).astype(float))  # (sizes, patterns): how many of each size a pack holds
    while True:
        solved = linprog(np.ones(patterns.shape[1]), A_ub=-patterns, b_ub=-counts, method="highs")
        worth = -solved.ineqlin.marginals
        value, pattern = _best_pattern(sizes, worth, capacity)
        if value <= 1 + 1e-4:  # by duality no packing has fewer than the programme's packs divided by `value`
            return min(1.0, float(lengths.sum() / max_tokens / (solved.fun / value)))
        patterns = np.hstack([patterns, pattern[:, None]])


def _best_pattern(
    sizes: NDArray[np.int64], worth: NDArray[np.float64], capacity: int
) -> tuple[float, NDArray[np.float64]]:
    """Return the largest worth of a pack, and that pack, by the knapsack's recursion."""
    best = np.zeros(capacity + 1)
    last = np.full(capacity + 1, -1)  # the size added last; -1: none
    for room in range(1, capacity + 1):
        best[room] = best[room - 1]
        fitting = int(np.searchsorted(sizes, room, "right"))
        if fitting:
            values = best[room - sizes[:fitting]] + worth[:fitting]
            if values.max() > best[room]:
                best[room], last[room] = values.max(), int(values.argmax())
    pattern, room = np.zeros(len(sizes)), capacity
    while room > 0:
        index = last[room]
        if index < 0:
            room -= 1
        else:
            pattern[index] += 1
            room -= int(sizes[index])
    return float(best[capacity]), pattern
