"""An order of a layer's neurons in which the sets of several tasks lie in few runs.

An MLP computes the same function when its neurons are permuted, and a run is read without gathering.
Neurons are sorted by which tasks keep them, the patterns following one another in reflected Gray
order (F. Gray, US patent 2632058): neighbours differ in one task, so few runs begin or end there.
The first task becomes a prefix, the second one run, the third two at most, the fourth four; the
neurons that any task keeps are a prefix too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def together(masks: Sequence[Tensor]) -> Tensor:
    """Return the order, int64 [neurons]: the neuron that comes to stand at each place.

    Parameters
    ----------
    masks
        For each task bool [neurons], true where it keeps the neuron; the tasks most used first.
    """
    bits = torch.stack([mask.to(torch.int8) for mask in masks])
    # What the first task keeps comes first; what no task keeps then has the last code of all.
    bits[0] = 1 - bits[0]
    rank = bits.cumsum(0) % 2
    order = torch.arange(bits.shape[1])
    for digit in reversed(rank):
        order = order[torch.sort(digit[order], stable=True).indices]
    return order


def inverse(order: Tensor) -> Tensor:
    """Return the place at which each neuron stands, int64 [neurons]."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return places
