"""How many neurons stay, and how many of them in each layer."""

from __future__ import annotations

from collections.abc import Sequence

from fbn_prune.errors import InvalidInput
from fbn_prune.networks.functional_networks import FunctionalNetworks

WIDE = 2048
"""From this width on, matrix kernels want multiples of 64; below it, a finer step costs no speed."""


def default_multiple(width: int) -> int:
    """The width multiple where the user names none."""
    return 64 if width >= WIDE else 8


def budget_from_networks(networks: FunctionalNetworks, kept: Sequence[int]) -> int:
    """Neurons that are members (abs z >= 2) of at least one kept network."""
    return int(networks.union(kept).sum())


def budget_from_sparsity(total: int, sparsity: float) -> int:
    """Neurons that stay when the share `sparsity` of `total` goes."""
    return round(total * (1 - sparsity))


def uniform_widths(budget: int, widths: Sequence[int], multiple: int) -> list[int]:
    """The same width in every layer: the multiple nearest to an even share of the budget, at least one multiple.

    Parameters
    ----------
    budget
        Neurons to keep over all layers.
    widths
        Present width of each layer; all equal in a stock checkpoint.

    Raises
    ------
    InvalidInput
        The multiple is wider than a layer, or the layers differ in width.
    """
    width = widths[0]
    if any(other != width for other in widths):
        raise InvalidInput(f"layers of different widths {sorted(set(widths))} cannot stay uniform")
    if multiple > width:
        raise InvalidInput(f"--width-multiple {multiple} is wider than a layer of {width} neurons")
    share = round(budget / len(widths) / multiple) * multiple
    kept = min(max(share, multiple), width)
    return [kept] * len(widths)
