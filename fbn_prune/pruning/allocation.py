"""Choose how many neurons the model keeps, and how many of them in each layer.

Ragged widths come from a ranking of all neurons of all layers by one score: a layer's width is the number of its
neurons among the best. The ranking sets the widths only; the criterion then chooses the neurons of each layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from fbn_prune.errors import InvalidInput
from fbn_prune.networks.functional_networks import FunctionalNetworks

WIDE = 2048
"""From this width on, matrix kernels are fastest with multiples of 64; below it, smaller multiples are as fast."""


def default_multiple(width: int) -> int:
    """Return the width multiple for layers of this width where the user sets none."""
    return 64 if width >= WIDE else 8


def budget_from_networks(networks: FunctionalNetworks, kept: Sequence[int]) -> int:
    """Return the number of neurons that are members (abs z >= 2) of at least one kept network."""
    return int(networks.union(kept).sum())


def budget_from_sparsity(total: int, sparsity: float) -> int:
    """Return the number of neurons that remain after removing the share `sparsity` of `total`."""
    return round(total * (1 - sparsity))


def uniform_widths(budget: int, widths: Sequence[int], multiple: int) -> list[int]:
    """Return one width for all layers: the multiple nearest to an even share of the budget, at least one multiple.

    Parameters
    ----------
    budget
        Neurons to keep over all layers.
    widths
        Present width of each layer.

    Raises
    ------
    InvalidInput
        The multiple, or an even share of the budget, is wider than the narrowest layer.
    """
    width = min(widths)
    if max(widths) > width and budget > (most := width * len(widths)):
        raise InvalidInput(
            f"the layers have {width} to {max(widths)} neurons, and equal layers can have at most {width} each, "
            f"{most:,} of {sum(widths):,} in all: use --layout ragged, or remove more (--sparsity "
            f"{math.ceil(1000 * (1 - most / sum(widths))) / 1000} or higher)"
        )
    if multiple > width:
        raise InvalidInput(
            f"--width-multiple {multiple} is wider than a layer of {width} neurons: give a smaller one"
        )
    share = round(budget / len(widths) / multiple) * multiple
    kept = min(max(share, multiple), width)
    return [kept] * len(widths)


def even_scores(widths: Sequence[int]) -> list[Tensor]:
    """Return scores by which :func:`ranked_widths` removes the same share of every layer; float64 [width] for each."""
    return [torch.arange(width, 0, -1, dtype=torch.float64) / width for width in widths]


def at_most(budget: int, layers: int, multiple: int) -> int:
    """Return the largest number of neurons up to `budget` for uniform widths of at least one multiple."""
    return max(budget // (layers * multiple), 1) * layers * multiple


def network_scores(networks: FunctionalNetworks, down_weights: Iterable[Tensor]) -> list[Tensor]:
    """Return each neuron's part in the networks times the output that it carries: ``m_j * sqrt(std_j * ||W_j||)``.

    m_j is the largest abs z over ALL networks, because a neuron that is small in every network matters to none.

    Parameters
    ----------
    down_weights
        For each layer W [d, neurons], or R W to weigh output errors by their effect on the loss.

    Returns
    -------
    list of Tensor
        float64 [neurons] for each layer.
    """
    strongest = networks.maps.abs().amax(0).double()
    scores: list[Tensor] = []
    for layer, weight in enumerate(down_weights):
        span = networks.layer_slice(layer)
        carried = networks.std[span].double() * weight.double().norm(dim=0).cpu()
        scores.append(strongest[span] * carried.sqrt())
    return scores


def member_scores(networks: FunctionalNetworks, kept: Sequence[int]) -> list[Tensor]:
    """Return the largest abs z over the kept networks (the published rule); float64 [neurons] for each layer."""
    strongest = networks.maps[list(kept)].abs().amax(0).double()
    return [strongest[networks.layer_slice(i)] for i in range(len(networks.widths))]


def ranked_widths(
    scores: Sequence[Tensor], budget: int, multiple: int, whole: Collection[int] = ()
) -> list[int]:
    """Return for each layer the number of its neurons that rank among the best of all layers.

    Parameters
    ----------
    scores
        [neurons] for each layer. Only their order matters; equal scores favour the earlier layer.
    budget
        Neurons to keep over all layers.
    multiple
        Each width is a multiple of this, at least one; a layer that keeps everything may be an exception.
    whole
        Layers that keep all their neurons; the other layers share the rest of the budget.

    Returns
    -------
    list of int
        Widths that sum to the budget within half a multiple, if the sizes of the layers allow it.
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
    """Interpolate between an even split and a rule's own widths.

    Parameters
    ----------
    even, ranked
        Widths of each layer by the even split and by the rule; their sums agree within half a multiple.
    strength
        0 gives the even widths, 1 the ranked ones.
    full
        Present number of neurons of each layer.
    multiple, whole
        As in :func:`ranked_widths`.

    Returns
    -------
    list of int
        Widths of the same sum, under the conditions of :func:`ranked_widths`.
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
    """Reduce the widest layer by a multiple, repeatedly, until the widths sum to at most the budget."""
    result = list(widths)
    while sum(result) > budget:
        room = [i for i in range(len(result)) if i not in whole and result[i] > multiple]
        if not room:
            break
        layer = max(room, key=lambda i: (result[i], -i))
        result[layer] = (result[layer] - 1) // multiple * multiple
    return result


def _rounded(counts: Sequence[int], full: Sequence[int], multiple: int) -> list[int]:
    """Multiples near the counts, with their sum: round down, then raise the widths that lost the most."""
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
