"""What the sizes of a layer cost: from a few measured widths to all of them. Pure numbers."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NARROW = 0.6
"""Costs are measured at this part of the budget's share, and halfway between that share and all neurons."""

HOPELESS = 1e6
"""The cost of a cut whose outputs are not finite."""

MOST_LOG = 50.0
"""The largest logarithm of an extrapolated cost."""

LEAST_ERROR = 1e-6
"""Errors of a layer's output below this part of its largest one are rounding."""

NO_LESS = 1e-9
"""The least divergence, in nats: a smaller one is rounding."""


@dataclass(frozen=True)
class Costs:
    """What the cuts of one layer cost, in nats a token.

    Attributes
    ----------
    of_widths
        The cost of each width of the grid, ascending in width.
    left_out
        The cost of a model without the layer.
    of_heads
        The cost of each number of attention heads that the layer may keep, ascending, with all neurons; empty if it
        keeps all.
    """

    of_widths: list[float]
    left_out: float
    of_heads: Sequence[float] = ()


def levels_to_measure(widths: Sequence[int], share: float) -> list[int]:
    """The levels of a layer to measure: below and above the budget's share of its neurons."""
    full = widths[-1]
    wanted = (NARROW * share, (1 + share) / 2)
    return [
        min(range(len(widths)), key=lambda level: abs(widths[level] - goal * full))
        for goal in wanted
    ]


def interpolated(errors: Sequence[float], measured: Mapping[int, float]) -> list[float]:
    """The cost of each width; it falls as the width grows, and the full width costs nothing.

    The logarithm of the cost is linear in that of the error of the layer's output between measured widths, and beyond
    them of slope 1: far from the dense model's output, costs are in proportion to the error.

    Parameters
    ----------
    errors
        Of each width, ascending in width.
    measured
        The cost of some widths, by their places.
    """
    last = len(errors) - 1
    floor = max(max(errors), NO_LESS) * LEAST_ERROR
    logs = [math.log(max(error, floor)) for error in errors]
    known: list[tuple[float, float]] = []  # by ascending error
    for place in sorted(measured, reverse=True):
        if place == last:
            continue
        cost = math.log(max(finite(measured[place]), NO_LESS))
        if known:  # noise must not make a narrower layer cheaper
            cost = max(cost, known[-1][1])
        if not known or logs[place] > known[-1][0]:
            known.append((logs[place], cost))
    if not known:
        return [0.0] * len(errors)
    found = [math.exp(min(_on_line(known, at), MOST_LOG)) for at in logs[:last]]
    for place in range(last - 2, -1, -1):
        found[place] = max(found[place], found[place + 1])
    return [*found, 0.0]


def _on_line(known: Sequence[tuple[float, float]], at: float) -> float:
    """The value at a place: between the two known ones around it, or of slope 1 from the nearest one."""
    after = bisect.bisect([place for place, _ in known], at)
    if after in (0, len(known)):
        place, value = known[min(after, len(known) - 1)]
        return value + at - place
    (left, low), (right, high) = known[after - 1], known[after]
    return low + (at - left) * (high - low) / (right - left)


def falling(costs: Sequence[float]) -> list[float]:
    """Return the costs of ascending sizes, where noise does not make a smaller one cheaper."""
    found = [max(finite(cost), 0.0) for cost in costs]
    for place in range(len(found) - 2, -1, -1):
        found[place] = max(found[place], found[place + 1])
    return found


def finite(cost: float) -> float:
    """Return the cost, or :data:`HOPELESS` if it is not a finite number."""
    return cost if math.isfinite(cost) else HOPELESS
