"""Order a layer's neurons so that the kept neurons of each of several tasks form few contiguous runs.

Permuting the neurons of an MLP does not change its output, and a contiguous run can be read without gathering. Neurons
are sorted by the set of tasks that keep them, with the sets in reflected Gray order (F. Gray, US patent 2632058):
neighbouring sets differ in one task, so few runs begin or end between them. The first task's neurons become a prefix,
the second's one run, the third's at most two, the fourth's at most four. The neurons of all tasks are a prefix too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def together(masks: Sequence[Tensor]) -> Tensor:
    """Return for each new position the neuron to put there, int64 [neurons].

    Parameters
    ----------
    masks
        For each task bool [neurons], true for the neurons that it keeps; the most used tasks first.
    """
    bits = torch.stack([mask.to(torch.int8) for mask in masks])
    # Inverting the first bit puts the first task's neurons first and those that no task keeps last.
    bits[0] = 1 - bits[0]
    rank = bits.cumsum(0) % 2
    order = torch.arange(bits.shape[1])
    for digit in reversed(rank):
        order = order[torch.sort(digit[order], stable=True).indices]
    return order


def inverse(order: Tensor) -> Tensor:
    """Return for each neuron its position in `order`, int64 [neurons]."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return places
