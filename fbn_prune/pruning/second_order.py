"""Choose the neurons that a layer can lose at least cost, and refit the output weights of the others.

Optimal brain surgeon (Hassibi & Stork, 1993) on whole neurons: removing neuron j from y = W x, with compensation by
the other neurons, raises the output error by ``||W_j||² / [H⁻¹]_jj``, where H = xᵀx / tokens. Neurons are removed in
small blocks; after each block, the exact block formula updates W and H⁻¹. At the end, a least-squares refit sets the
output weights of the kept neurons.

Pure numerics in float64: W [d, neurons], H [neurons, neurons], on any device, independent of models.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from fbn_prune.pruning.damping import factored, ridge

BLOCKS_PER_LAYER = 64
"""Remove neurons in about this many blocks per layer: fewer blocks give visibly worse cuts, more take longer and
change little."""

INVERSE_TOLERANCE = 1e-6
"""Rounding may push [H⁻¹]_jj this far below its lower bound 1 / H_jj before H⁻¹ is recomputed."""


def choose_neurons(weight: Tensor, gram: Tensor, keep: int, *, damping: float) -> Tensor:
    """Return the neurons to keep after removing the cheapest ones block by block.

    Parameters
    ----------
    weight
        Output projection [d, neurons], float64.
    gram
        H or a covariance [neurons, neurons], float64.
    keep
        Number of neurons to keep, 0 < keep <= neurons.
    damping
        Share of the mean diagonal of H added before inversion, see :func:`fbn_prune.pruning.damping.ridge`.

    Returns
    -------
    Tensor
        int64 [keep], ascending.
    """
    surgeon = _Surgeon(weight, gram, damping)
    while surgeon.left > keep:
        surgeon.remove_cheapest(surgeon.left - keep)
    return surgeon.kept


def choose_groups(weight: Tensor, gram: Tensor, size: int, keep: int, *, damping: float) -> Tensor:
    """Return the groups of inputs to keep after removing the cheapest group repeatedly.

    Removing group G costs ``tr(W_G ([H⁻¹]_GG)⁻¹ W_Gᵀ)`` after compensation by the others: the formula for one neuron,
    with a matrix block instead of a number.

    Parameters
    ----------
    weight, gram, damping
        As in :func:`choose_neurons`, over the inputs of all groups in order: [d, groups * size].
    size
        Inputs of one group, such as the channels of an attention head.
    keep
        Number of groups to keep, 0 < keep <= groups.

    Returns
    -------
    Tensor
        int64 [keep], ascending.
    """
    surgeon = _Surgeon(weight, gram, damping)
    while surgeon.left > keep * size:
        surgeon.remove_cheapest_group(size)
    return surgeon.kept[::size] // size


def removal_costs(weight: Tensor, gram: Tensor, *, damping: float) -> Tensor:
    """Return each neuron's removal cost when all neurons are removed, cheapest first: the slope of the removal curve.

    Parameters are as in :func:`choose_neurons`, which removes neurons in the same order.

    Returns
    -------
    Tensor
        float64 [neurons], in units of the squared MLP output; never less than the cost of a neuron removed earlier.
    """
    costs = weight.new_zeros(weight.shape[1])
    highest = 0.0
    for gone, cost in _removals(weight, gram, damping):
        costs[gone] = cost.clamp(min=highest)
        highest = float(costs[gone].max())
    return costs


def removal_order(weight: Tensor, gram: Tensor, *, damping: float) -> Tensor:
    """Return all neurons in order of removal: the last `keep` are those that :func:`choose_neurons` keeps.

    Removing all neurons takes little longer than removing most of them, and gives the result for every width.

    Returns
    -------
    Tensor
        int64 [neurons].
    """
    return torch.cat([gone for gone, _ in _removals(weight, gram, damping)])


def loss_root(sensitivity: Tensor) -> Tensor:
    """Return R with F = RᵀR; multiplying output weights by R weighs their errors by the effect on the loss.

    Scored by R W instead of W, a neuron's cost is the rise of the loss to second order, ``||R W_j||² / [H⁻¹]_jj``.
    The best compensating weights do not depend on F, so the refit stays the same.

    Parameters
    ----------
    sensitivity
        F = E[g gᵀ] of the loss gradient g at the MLP output, [d, d], float64.
    """
    values, vectors = torch.linalg.eigh(sensitivity)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _removals(weight: Tensor, gram: Tensor, damping: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Remove all neurons, cheapest first; yields each block's neurons and their costs."""
    surgeon = _Surgeon(weight, gram, damping)
    while surgeon.left > 0:
        yield surgeon.remove_cheapest(surgeon.left)


class _Surgeon:
    """Removes neurons from one layer, block by block.

    W and H⁻¹ hold the remaining neurons first, in any order: removed neurons swap places with the last remaining
    ones, so only their own rows and columns are copied.
    """

    def __init__(self, weight: Tensor, gram: Tensor, damping: float) -> None:
        self._original, self._gram = weight, gram
        self._ridge = ridge(gram, damping)
        self._block = max(1, weight.shape[1] // BLOCKS_PER_LAYER)
        factor = factored(gram, self._ridge)
        self._energy = factor.square().sum(1)  # the diagonal of the damped H
        self.left = weight.shape[1]
        self._neurons = torch.arange(self.left, device=weight.device)
        self._weight, self._inverse = weight.clone(), torch.cholesky_inverse(factor)

    @property
    def kept(self) -> Tensor:
        """The remaining neurons, ascending."""
        return self._neurons[: self.left].sort().values

    def remove_cheapest(self, most: int) -> tuple[Tensor, Tensor]:
        """Remove one block of at most `most` neurons; returns the neurons, cheapest first, and their costs."""
        neurons, weight, inverse = self._all_left()
        cost = weight.square().sum(0) / inverse.diagonal()
        by_index = neurons.argsort()  # for equal costs, the neuron of lower index is removed first
        places = by_index[cost[by_index].argsort(stable=True)][: min(self._block, most)]
        gone = neurons[places], cost[places]
        self._take_out(places.sort().values)
        return gone

    def remove_cheapest_group(self, size: int) -> None:
        """Remove the cheapest group of `size` consecutive inputs."""
        _, weight, inverse = self._all_left()
        groups = self.left // size
        own = inverse.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        columns = weight.view(-1, groups, size).permute(1, 2, 0)  # [groups, size, d]
        cost = (columns * torch.linalg.solve(own, columns)).sum((1, 2))
        first = int(cost.argmin()) * size
        self._take_out(torch.arange(first, first + size, device=weight.device))

    def _all_left(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the remaining neurons' indices [left], weights [d, left] and H⁻¹ [left, left]."""
        left = self.left
        return self._neurons[:left], self._weight[:, :left], self._inverse[:left, :left]

    def _take_out(self, places: Tensor) -> None:
        """Remove the neurons at `places` (ascending), with compensation by the others."""
        neurons, weight, inverse = self._all_left()
        stay = self.left - len(places)
        _move_last(places, neurons, weight, inverse)
        between = inverse[stay:, :stay]
        solved = torch.linalg.solve(inverse[stay:, stay:], between)
        weight[:, :stay].addmm_(weight[:, stay:], solved, alpha=-1)
        inverse[:stay, :stay].addmm_(between.T, solved, alpha=-1)
        self.left = stay
        if not self._sound():
            self._start_afresh()

    def _sound(self) -> bool:
        """Whether H⁻¹ is still precise: its diagonal cannot be less than 1 / diag(H)."""
        neurons, _, inverse = self._all_left()
        share = inverse.diagonal() * self._energy[neurons]
        return bool((share >= 1 - INVERSE_TOLERANCE).all())

    def _start_afresh(self) -> None:
        """Recompute W and H⁻¹ for the remaining neurons, free of accumulated rounding errors."""
        kept = self.kept
        inner = self._gram[kept[:, None], kept]
        factor = factored(inner, self._ridge)
        target = self._original @ self._gram[:, kept]
        target += self._ridge * self._original[:, kept]
        self._neurons = kept
        self._weight = torch.cholesky_solve(target.T, factor).T.contiguous()
        self._inverse = torch.cholesky_inverse(factor)


def _move_last(places: Tensor, neurons: Tensor, weight: Tensor, inverse: Tensor) -> None:
    """Swap the neurons at `places` (ascending) with the last ones."""
    first_last = len(neurons) - len(places)
    last = torch.arange(first_last, len(neurons), device=places.device)
    early = places[places < first_last]
    late = last[~torch.isin(last, places)]
    one, other = torch.cat([early, late]), torch.cat([late, early])
    neurons[one] = neurons[other]
    weight[:, one] = weight[:, other]
    inverse[one] = inverse[other]
    inverse[:, one] = inverse[:, other]


def refit(
    weight: Tensor, gram: Tensor, kept: Tensor, *, damping: float, missing: Tensor | None = None
) -> Tensor:
    """Return least-squares output weights on the kept neurons, held near the original ones by the damping.

    Minimises ``E||W x + m - W' x_kept||² + ridge ||W' - W_kept||²``, where m is what the output should have in
    addition. The damping pulls towards the original weights instead of zero. The refit is therefore never worse on
    these statistics than no refit, and without m it changes nothing if no neuron is removed.

    Parameters
    ----------
    weight
        [d, neurons], float64.
    gram
        H = E[xᵀx], [neurons, neurons].
    kept
        int64 [n], ascending.
    missing
        E[mᵀx], [d, neurons]; None means m = 0.

    Returns
    -------
    Tensor
        float64 [d, n].
    """
    residual = of_others(weight, gram[:, kept], kept)
    if missing is not None:
        residual += missing[:, kept]
    elif len(kept) == weight.shape[1]:
        return weight.clone()
    inner = gram[kept[:, None], kept]
    factor = factored(inner, ridge(inner, damping))
    return weight[:, kept] + torch.cholesky_solve(residual.T, factor).T


def nested_refits(
    weight: Tensor, gram: Tensor, best: Tensor, widths: Collection[int], *, damping: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the kept neurons and their refit for each width, the widest first.

    What the removed neurons did is summed once for all widths.

    Parameters
    ----------
    weight, gram, damping
        As in :func:`refit`.
    best
        int64 [neurons]; a width keeps the first of them.
    """
    weight, gram = weight[:, best], gram[best][:, best]
    residual, before = torch.zeros_like(weight), len(best)
    for width in sorted(widths, reverse=True):
        residual = residual[:, :width] + weight[:, width:before] @ gram[width:before, :width]
        before, found = width, weight[:, :width]
        if width < len(best):
            inner = gram[:width, :width]
            factor = factored(inner, ridge(inner, damping))
            found = found + torch.cholesky_solve(residual.T, factor).T
            del factor
        ascending = best[:width].argsort()
        yield best[:width][ascending], found[:, ascending]


def of_others(weight: Tensor, columns: Tensor, kept: Tensor) -> Tensor:
    """Return W [d, neurons] times the columns [neurons, n] without what the kept neurons add to it, [d, n]."""
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    return weight[:, gone] @ columns[gone]


def erased(
    weight: Tensor, gram: Tensor, skill: Tensor, *, strength: float, damping: float
) -> Tensor:
    """Return output weights that do on other text what they did, and little on a skill's text.

    Minimises ``E||(W - W') x||² + strength * E_skill||W' x||² + ridge ||W - W'||²``; no neuron is removed.

    Parameters
    ----------
    weight
        [d, neurons], float64.
    gram, skill
        E[xᵀx] on other text and on the skill's, [neurons, neurons].
    strength
        How much the output on the skill's text counts, > 0.
    """
    factor = factored(gram + strength * skill, ridge(gram, damping))
    return weight - torch.cholesky_solve((strength * (weight @ skill)).T, factor).T


def output_error(weight: Tensor, gram: Tensor, kept: Tensor, new_weight: Tensor) -> float:
    """Return E||W x - W' x_kept||² under H, in units of the squared MLP output."""
    difference = weight.clone()
    difference[:, kept] -= new_weight
    return float(((difference @ gram) * difference).sum())
