"""The random sets the benchmarks run through."""

from __future__ import annotations

import torch

from fbn_kernels import BLOCK, Kind, NeuronSet


def draw_set(neurons: int, share: float, kind: Kind, seed: int = 0) -> NeuronSet:
    """Draw a set of `share` of the neurons: a prefix, aligned blocks, or rows.

    Their number is a multiple of 64, as widths of exported layers are: matrix libraries are many
    times slower at odd ones, and a peer measured there would be no peer.
    """
    count = round(neurons * share / BLOCK) * BLOCK
    generator = torch.Generator().manual_seed(seed)
    if kind is Kind.PREFIX:
        return NeuronSet.from_indices(torch.arange(count), neurons)
    if kind is Kind.BLOCK64:
        order = torch.randperm(neurons // BLOCK, generator=generator)
        blocks = order[: count // BLOCK].sort().values
        indices = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
        return NeuronSet.from_indices(indices, neurons)
    kept = torch.randperm(neurons, generator=generator)[:count]
    return NeuronSet.from_indices(kept.sort().values, neurons)
