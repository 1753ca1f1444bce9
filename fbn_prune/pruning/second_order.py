"""Which neurons a layer can spare, and the output weights with which the others do their work.

Optimal brain surgeon (Hassibi & Stork, 1993) on whole neurons: removing neuron j from y = W x and letting the others
compensate raises the output error by ``||W_j||² / [H⁻¹]_jj`` with H = xᵀx / tokens. Neurons go a small block at a
time, W and H⁻¹ updated by the exact block formula in between; a least-squares refit on the kept set closes the step.

Pure numerics in float64: W [d, neurons], H [neurons, neurons], on any device. Nothing here knows of models.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fbn_prune.pruning.damping import factored, ridge

BLOCKS_PER_LAYER = 64
"""Neurons leave in at most this many blocks a layer: fewer is visibly worse, more costs time and changes little."""

INVERSE_TOLERANCE = 1e-6
"""How far rounding may push [H⁻¹]_jj below its least possible value, 1 / H_jj, before H⁻¹ is computed afresh."""


def choose_neurons(weight: Tensor, gram: Tensor, keep: int, *, damping: float) -> Tensor:
    """Indices of the neurons to keep, by removing the cheapest ones block after block.

    Parameters
    ----------
    weight
        Output projection [d, neurons], float64.
    gram
        H or a covariance [neurons, neurons], float64.
    keep
        Number of neurons that stay, 0 < keep <= neurons.
    damping
        Share of the mean diagonal of H added before inversion, see :func:`fbn_prune.pruning.damping.ridge`.

    Returns
    -------
    int64 [keep], ascending.
    """
    surgeon = _Surgeon(weight, gram, damping)
    while surgeon.left > keep:
        surgeon.remove_cheapest(surgeon.left - keep)
    return surgeon.kept


def choose_groups(weight: Tensor, gram: Tensor, size: int, keep: int, *, damping: float) -> Tensor:
    """Indices of the groups of inputs to keep, by removing the cheapest group again and again.

    Taking group G out costs ``tr(W_G ([H⁻¹]_GG)⁻¹ W_Gᵀ)`` once the others compensate: the formula for one neuron,
    with a block in the place of a number.

    Parameters
    ----------
    weight, gram, damping
        As for :func:`choose_neurons`, over the groups' inputs one after another: [d, groups * size].
    size
        Inputs of a group: the channels of an attention head, for instance.
    keep
        Number of groups that stay, 0 < keep <= groups.

    Returns
    -------
    int64 [keep], ascending.
    """
    surgeon = _Surgeon(weight, gram, damping)
    while surgeon.left > keep * size:
        surgeon.remove_cheapest_group(size)
    return surgeon.kept[::size] // size


def removal_costs(weight: Tensor, gram: Tensor, *, damping: float) -> Tensor:
    """What each neuron's removal costs when all go, the cheapest first: the slope of the removal curve.

    Parameters as for :func:`choose_neurons`, which removes in this order.

    Returns
    -------
    float64 [neurons], in units of the squared MLP output; never less than that of a neuron that goes earlier.
    """
    costs = weight.new_zeros(weight.shape[1])
    highest = 0.0
    for gone, cost in _removals(weight, gram, damping):
        costs[gone] = cost.clamp(min=highest)
        highest = float(costs[gone].max())
    return costs


def removal_order(weight: Tensor, gram: Tensor, *, damping: float) -> Tensor:
    """All neurons in the order in which they go: the last `keep` are those that :func:`choose_neurons` keeps.

    One removal of all costs little more than one down to a few, and answers for every width.

    Returns
    -------
    int64 [neurons].
    """
    return torch.cat([gone for gone, _ in _removals(weight, gram, damping)])


def loss_root(sensitivity: Tensor) -> Tensor:
    """R with F = RᵀR, by which output weights are multiplied where errors count as the loss feels them.

    A weight W scored as R W, its cost is the rise of the loss to second order: ``||R W_j||² / [H⁻¹]_jj``. Which
    weights compensate best does not depend on F, so nothing else changes.

    Parameters
    ----------
    sensitivity
        F = E[g gᵀ] of the loss gradient g at the MLP output, [d, d], float64.
    """
    values, vectors = torch.linalg.eigh(sensitivity)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _removals(weight: Tensor, gram: Tensor, damping: float) -> Iterator[tuple[Tensor, Tensor]]:
    """The neurons of one block after another until none is left, cheapest first, and what each cost."""
    surgeon = _Surgeon(weight, gram, damping)
    while surgeon.left > 0:
        yield surgeon.remove_cheapest(surgeon.left)


class _Surgeon:
    """Takes neurons out of one layer, from all of them to the last.

    The neurons that are left stand first in W and H⁻¹, in any order: those that go change places with the last ones,
    so that nothing but their rows and columns is copied.
    """

    def __init__(self, weight: Tensor, gram: Tensor, damping: float) -> None:
        self._original, self._gram = weight, gram
        self._ridge = ridge(gram, damping)
        self._block = max(1, weight.shape[1] // BLOCKS_PER_LAYER)
        factor = factored(gram, self._ridge)
        self._energy = factor.square().sum(1)  # the diagonal of H as it was damped
        self.left = weight.shape[1]
        self._neurons = torch.arange(self.left, device=weight.device)
        self._weight, self._inverse = weight.clone(), torch.cholesky_inverse(factor)

    @property
    def kept(self) -> Tensor:
        """The neurons that are left, ascending."""
        return self._neurons[: self.left].sort().values

    def remove_cheapest(self, most: int) -> tuple[Tensor, Tensor]:
        """Take out a block, of `most` neurons at most: which they were (cheapest first) and what each cost."""
        neurons, weight, inverse = self._all_left()
        cost = weight.square().sum(0) / inverse.diagonal()
        by_number = neurons.argsort()  # of equal costs the first neuron goes first
        places = by_number[cost[by_number].argsort(stable=True)][: min(self._block, most)]
        gone = neurons[places], cost[places]
        self._take_out(places.sort().values)
        return gone

    def remove_cheapest_group(self, size: int) -> None:
        """Take out the `size` neighbours, of those left, that cost least together."""
        _, weight, inverse = self._all_left()
        groups = self.left // size
        own = inverse.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        columns = weight.view(-1, groups, size).permute(1, 2, 0)  # [groups, size, d]
        cost = (columns * torch.linalg.solve(own, columns)).sum((1, 2))
        first = int(cost.argmin()) * size
        self._take_out(torch.arange(first, first + size, device=weight.device))

    def _all_left(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the neurons' numbers [left], weights [d, left] and H⁻¹ [left, left]."""
        left = self.left
        return self._neurons[:left], self._weight[:, :left], self._inverse[:left, :left]

    def _take_out(self, places: Tensor) -> None:
        """Remove the neurons at these places, ascending, and let the others compensate."""
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
        """Whether H⁻¹ is still one: its diagonal cannot be less than one over that of H."""
        neurons, _, inverse = self._all_left()
        share = inverse.diagonal() * self._energy[neurons]
        return bool((share >= 1 - INVERSE_TOLERANCE).all())

    def _start_afresh(self) -> None:
        """Go on from what the block formula would have come to without rounding."""
        kept = self.kept
        inner = self._gram[kept[:, None], kept]
        factor = factored(inner, self._ridge)
        target = self._original @ self._gram[:, kept]
        target += self._ridge * self._original[:, kept]
        self._neurons = kept
        self._weight = torch.cholesky_solve(target.T, factor).T.contiguous()
        self._inverse = torch.cholesky_inverse(factor)


def _move_last(places: Tensor, neurons: Tensor, weight: Tensor, inverse: Tensor) -> None:
    """Let the neurons at `places`, ascending, change places with those at the end that are not among them."""
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
    weight: Tensor, gram: Tensor, kept: Tensor, *, damping: float, cross: Tensor | None = None
) -> Tensor:
    """Least-squares output weights on the kept neurons, held near the original ones by the damping.

    Minimises ``E||W t - W' x_kept||² + ridge ||W' - W_kept||²``, where t is x itself, or another signal of the same
    shape whose cross product with x is given. Near the original weights, not near zero: the refit then never does
    worse on these statistics than no refit, and it changes nothing where nothing is missing.

    Parameters
    ----------
    weight
        [d, neurons], float64.
    gram
        H = E[xᵀx], [neurons, neurons].
    kept
        int64 [n], ascending.
    cross
        E[tᵀx], [neurons, neurons]; default H (t = x).

    Returns
    -------
    float64 [d, n].
    """
    target = weight @ (gram if cross is None else cross)[:, kept]
    inner = gram[kept[:, None], kept]
    residual = target - weight[:, kept] @ inner
    factor = factored(inner, ridge(inner, damping))
    return weight[:, kept] + torch.cholesky_solve(residual.T, factor).T


def output_error(weight: Tensor, gram: Tensor, kept: Tensor, new_weight: Tensor) -> float:
    """E||W x - W' x_kept||² under H, in units of the squared MLP output."""
    difference = weight.clone()
    difference[:, kept] -= new_weight
    return float(((difference @ gram) * difference).sum())
