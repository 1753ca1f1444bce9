"""Choose one entry for each layer so that the sum of their costs is least within a budget.

Dynamic programming over the layers: the least cost of the first layers at every total size. Pure numbers; what the
entries are does not matter here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fbn_prune.errors import InvalidInput

MOST_UNITS = 2**17
"""Sizes are counted in at most this many units. Models of many layers of any width would need more; there each layer's
size is rounded up, so that the sum stays within the budget and misses it by less than one unit a layer."""


def cheapest(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """Return for each layer the index of the chosen entry.

    Parameters
    ----------
    sizes
        For each layer the sizes of its entries, at least 0.
    costs
        For each layer the cost of each entry.
    budget
        The largest sum of sizes.

    Raises
    ------
    InvalidInput
        Even the smallest entries exceed the budget.
    """
    least = sum(min(entries) for entries in sizes)
    if least > budget:
        raise InvalidInput("no model is that small: ask for a larger one")
    most = min(budget, sum(max(entries) for entries in sizes))
    unit = math.gcd(*(size for entries in sizes for size in entries)) or 1
    if most // unit > MOST_UNITS and most - least > most * len(sizes) // MOST_UNITS:
        unit = -(-most // MOST_UNITS)
    room = most // unit
    best = np.zeros(room + 1)
    chosen = np.zeros((len(sizes), room + 1), dtype=np.int16)
    for layer, (entries, prices) in enumerate(zip(sizes, costs, strict=True)):
        found = np.full(room + 1, np.inf)
        for index, (size, price) in enumerate(zip(entries, prices, strict=True)):
            steps = -(-size // unit)
            if steps > room:
                continue
            reached = np.full(room + 1, np.inf)
            reached[steps:] = best[: room + 1 - steps] + price
            better = reached < found
            found[better], chosen[layer][better] = reached[better], index
        best = found
    choice: list[int] = []
    left = room
    for layer in range(len(sizes) - 1, -1, -1):
        choice.append(int(chosen[layer][left]))
        left -= -(-sizes[layer][choice[-1]] // unit)
    return choice[::-1]
