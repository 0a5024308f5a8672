"""The multiple-choice knapsack: one candidate for every matrix, least total cost under a limit on the total size.

Solved exactly by dynamic programming over sizes, counted from the smallest choice of every matrix in units of their greatest
common divisor: `best[u]` is the least cost of the matrices so far in at most u units. Where even so there would be more than
`_MOST_UNITS`, sizes are counted in larger units, rounded up: the answer then keeps to the limit, and is the best of those
that do in the coarser count.
Cost: matrices x candidates x units, in vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_MOST_UNITS = 1 << 20


def choose(sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], limit: int) -> list[int]:
    """The index of the chosen candidate of every matrix; of equal costs the smaller one.

    Args:
        sizes: of every matrix, the sizes of its candidates.
        costs: as `sizes`.
        limit: on the sum of the sizes.
    Raises:
        ValueError: not even the smallest candidates fit.
    """
    least = [min(row) for row in sizes]
    room = limit - sum(least)
    if room < 0:
        raise ValueError(f"the smallest choice of everything takes {sum(least)}, more than {limit}")
    unit = math.gcd(*(size - low for row, low in zip(sizes, least, strict=True) for size in row)) or 1
    room = min(room, sum(max(row) - low for row, low in zip(sizes, least, strict=True)))
    unit *= math.ceil(max(1, room // unit) / _MOST_UNITS)
    units = room // unit
    best = np.zeros(units + 1)
    picks = []
    for row, low, cost in zip(sizes, least, costs, strict=True):
        total = np.full(units + 1, np.inf)
        pick = np.zeros(units + 1, dtype=np.int16)
        for index in sorted(range(len(row)), key=row.__getitem__):
            steps = math.ceil((row[index] - low) / unit)
            if steps > units:
                break
            with_it = best[: units + 1 - steps] + cost[index]
            better = with_it < total[steps:]
            total[steps:][better] = with_it[better]
            pick[steps:][better] = index
        best = total
        picks.append(pick)
    chosen, left = [], units
    for row, low, pick in zip(reversed(sizes), reversed(least), reversed(picks), strict=True):
        index = int(pick[left])
        chosen.append(index)
        left -= math.ceil((row[index] - low) / unit)
    return chosen[::-1]
