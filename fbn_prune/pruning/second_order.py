"""Which neurons a layer can spare, and the output weights with which the others do their work.

Optimal brain surgeon (Hassibi & Stork, 1993) on whole neurons: removing neuron j from y = W x and letting the others
compensate raises the output error by ``||W_j||² / [H⁻¹]_jj`` with H = xᵀx / tokens. Neurons go a small block at a
time, W and H⁻¹ updated by the exact block formula in between; a least-squares refit on the kept set closes the step.

Pure numerics in float64: W [d, neurons], H [neurons, neurons], on any device. Nothing here knows of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    while len(surgeon.step.kept) > keep:
        surgeon.remove_cheapest(len(surgeon.step.kept) - keep)
    return surgeon.step.kept


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
    while len(surgeon.step.kept) > keep * size:
        surgeon.remove_cheapest_group(size)
    return surgeon.step.kept[::size] // size


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


@dataclass(frozen=True)
class _Step:
    """Between two removals: the neurons that are left, their weights as compensated so far, their H⁻¹."""

    kept: Tensor
    weight: Tensor
    inverse: Tensor


def _removals(weight: Tensor, gram: Tensor, damping: float) -> Iterator[tuple[Tensor, Tensor]]:
    """The neurons of one block after another until none is left, cheapest first, and what each cost."""
    surgeon = _Surgeon(weight, gram, damping)
    while len(surgeon.step.kept) > 0:
        yield surgeon.remove_cheapest(len(surgeon.step.kept))


class _Surgeon:
    """Takes neurons out of one layer, from all of them to the last."""

    def __init__(self, weight: Tensor, gram: Tensor, damping: float) -> None:
        self._weight, self._gram = weight, gram
        self._ridge = ridge(gram, damping)
        self._block = max(1, weight.shape[1] // BLOCKS_PER_LAYER)
        factor = factored(gram, self._ridge)
        self._energy = factor.square().sum(1)  # the diagonal of H as it was damped
        kept = torch.arange(weight.shape[1], device=weight.device)
        self.step = _Step(kept, weight, torch.cholesky_inverse(factor))

    def remove_cheapest(self, most: int) -> tuple[Tensor, Tensor]:
        """Take out a block, of `most` neurons at most: which they were (cheapest first) and what each cost."""
        kept, weight, inverse = self.step.kept, self.step.weight, self.step.inverse
        count = min(self._block, most)
        cost = weight.square().sum(0) / inverse.diagonal()
        order = torch.argsort(cost, stable=True)
        gone = order[:count]
        self._take_out(gone, order[count:].sort().values)
        return kept[gone], cost[gone]

    def remove_cheapest_group(self, size: int) -> None:
        """Take out the `size` neighbours, of those left, that cost least together."""
        weight, inverse = self.step.weight, self.step.inverse
        groups = weight.shape[1] // size
        own = inverse.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        columns = weight.view(-1, groups, size).permute(1, 2, 0)  # [groups, size, d]
        cost = (columns * torch.linalg.solve(own, columns)).sum((1, 2))
        cheapest = int(cost.argmin())
        members = torch.arange(groups * size, device=weight.device).view(groups, size)
        stay = torch.cat([members[:cheapest], members[cheapest + 1 :]]).flatten()
        self._take_out(members[cheapest], stay)

    def _take_out(self, gone: Tensor, stay: Tensor) -> None:
        """Remove the columns `gone` of those left; `stay` are the others, ascending."""
        kept, weight, inverse = self.step.kept, self.step.weight, self.step.inverse
        between = inverse[gone][:, stay]
        solved = torch.linalg.solve(inverse[gone][:, gone], between)
        left = _Step(
            kept[stay],
            weight[:, stay].addmm_(weight[:, gone], solved, alpha=-1),
            inverse[stay[:, None], stay].addmm_(between.T, solved, alpha=-1),
        )
        self.step = left if self._sound(left) else self._afresh(left.kept)

    def _sound(self, step: _Step) -> bool:
        """Whether H⁻¹ is still one: its diagonal cannot be less than one over that of H."""
        share = step.inverse.diagonal() * self._energy[step.kept]
        return bool((share >= 1 - INVERSE_TOLERANCE).all())

    def _afresh(self, kept: Tensor) -> _Step:
        """What the block formula would have come to without rounding."""
        inner = self._gram[kept[:, None], kept]
        factor = factored(inner, self._ridge)
        target = self._weight @ self._gram[:, kept]
        target += self._ridge * self._weight[:, kept]
        solved = torch.cholesky_solve(target.T, factor).T
        return _Step(kept, solved, torch.cholesky_inverse(factor))


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
