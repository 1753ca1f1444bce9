"""How many neurons stay, and how many of them in each layer.

Ragged widths come from ranking all neurons of all layers by one score and keeping the best: as many as a layer has
among them is its width. Which neurons those are is of no account afterwards; a layer chooses its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

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


def at_most(budget: int, layers: int, multiple: int) -> int:
    """The largest number of neurons up to `budget` that uniform widths can keep, at least one multiple a layer."""
    return max(budget // (layers * multiple), 1) * layers * multiple


def network_scores(networks: FunctionalNetworks, down_weights: Iterable[Tensor]) -> list[Tensor]:
    """``m_j * sqrt(std_j * ||W_j||)`` of each layer's neurons: part in the networks times output carried.

    m_j is the largest abs z over ALL networks: what is large in none of them matters to none.

    Parameters
    ----------
    down_weights
        For each layer W [d, neurons], or R W where errors are to count as the loss feels them.

    Returns
    -------
    For each layer float64 [neurons].
    """
    strongest = networks.maps.abs().amax(0).double()
    scores: list[Tensor] = []
    for layer, weight in enumerate(down_weights):
        span = networks.layer_slice(layer)
        carried = networks.std[span].double() * weight.double().norm(dim=0).cpu()
        scores.append(strongest[span] * carried.sqrt())
    return scores


def member_scores(networks: FunctionalNetworks, kept: Sequence[int]) -> list[Tensor]:
    """Largest abs z over the kept networks, for each layer float64 [neurons]: the published threshold rule."""
    strongest = networks.maps[list(kept)].abs().amax(0).double()
    return [strongest[networks.layer_slice(i)] for i in range(len(networks.widths))]


def ranked_widths(
    scores: Sequence[Tensor], budget: int, multiple: int, whole: Collection[int] = ()
) -> list[int]:
    """Widths by rank: as many of a layer's neurons as are among the best of all layers.

    Parameters
    ----------
    scores
        For each layer [neurons]. Only their order matters; ties go to the earlier layer.
    budget
        Neurons to keep over all layers.
    multiple
        Widths are multiples of this (a whole layer may be none), at least one.
    whole
        Layers that keep everything; the others share what is left of the budget.

    Returns
    -------
    Widths that sum to the budget, to within half a multiple, wherever the bounds of the layers allow it.
    """
    full = [len(layer) for layer in scores]
    shared = [layer for layer in range(len(full)) if layer not in whole]
    left = budget - sum(full[layer] for layer in whole)
    left = min(max(left, 0), sum(full[layer] for layer in shared))
    ranked = torch.cat([scores[layer] for layer in shared]) if shared else torch.zeros(0)
    origin = torch.repeat_interleave(
        torch.tensor(shared, dtype=torch.int64),
        torch.tensor([full[i] for i in shared], dtype=torch.int64),
    )
    best = torch.argsort(ranked, descending=True, stable=True)[:left]
    counts = torch.bincount(origin[best], minlength=len(full)).tolist()
    widths = _rounded(
        [counts[layer] for layer in shared], [full[layer] for layer in shared], multiple
    )
    result = list(full)
    for layer, width in zip(shared, widths, strict=True):
        result[layer] = width
    return result


def blended_widths(
    even: Sequence[int],
    ranked: Sequence[int],
    strength: float,
    full: Sequence[int],
    multiple: int,
    whole: Collection[int] = (),
) -> list[int]:
    """Part of the way from an even split to a rule's own widths.

    Parameters
    ----------
    even, ranked
        Widths of each layer, of the same sum to within half a multiple.
    strength
        0 gives the even ones, 1 the ranked ones.
    full
        Neurons of each layer now.

    Returns
    -------
    Widths as of :func:`ranked_widths`, which keep what these two keep.
    """
    shared = [layer for layer in range(len(full)) if layer not in whole]
    shares = [(1 - strength) * even[i] + strength * ranked[i] for i in shared]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: round(sum(shares)) - sum(counts)]:
        counts[i] += 1
    result = list(full)
    widths = _rounded(counts, [full[layer] for layer in shared], multiple)
    for layer, width in zip(shared, widths, strict=True):
        result[layer] = width
    return result


def narrowed(
    widths: Sequence[int], budget: int, multiple: int, whole: Collection[int] = ()
) -> list[int]:
    """The widths, the widest cut by a multiple at a time until they hold no more than the budget."""
    result = list(widths)
    while sum(result) > budget:
        room = [i for i in range(len(result)) if i not in whole and result[i] > multiple]
        if not room:
            break
        layer = max(room, key=lambda i: (result[i], -i))
        result[layer] = (result[layer] - 1) // multiple * multiple
    return result


def _rounded(counts: Sequence[int], full: Sequence[int], multiple: int) -> list[int]:
    """Multiples near the counts and with their sum: rounded down, then up again where the most was lost."""
    widths = [
        count if count == most else min(max(count // multiple, 1) * multiple, most)
        for count, most in zip(counts, full, strict=True)
    ]
    budget = sum(counts)
    while budget - sum(widths) >= max(multiple / 2, 1):
        room = [i for i in range(len(widths)) if widths[i] < full[i]]
        layer = max(room, key=lambda i: (counts[i] - widths[i], -i))
        widths[layer] = min(widths[layer] + multiple, full[layer])
    while sum(widths) - budget > multiple / 2:
        room = [i for i in range(len(widths)) if widths[i] > multiple]
        if not room:
            break
        layer = max(room, key=lambda i: (widths[i] - counts[i], -i))
        widths[layer] = (widths[layer] - 1) // multiple * multiple
    return widths
