"""The random sets the benchmarks run through."""

from __future__ import annotations

import torch

from fbn_kernels import BLOCK, Kind, NeuronSet


def draw_set(neurons: int, share: float, kind: Kind, seed: int = 0) -> NeuronSet:
    """Draw a set of `share` of the neurons: a prefix, aligned blocks, or rows."""
    generator = torch.Generator().manual_seed(seed)
    if kind is Kind.PREFIX:
        return NeuronSet.from_indices(torch.arange(round(neurons * share)), neurons)
    if kind is Kind.BLOCK64:
        order = torch.randperm(neurons // BLOCK, generator=generator)
        blocks = order[: round(neurons * share / BLOCK)].sort().values
        indices = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
        return NeuronSet.from_indices(indices, neurons)
    kept = torch.randperm(neurons, generator=generator)[: round(neurons * share)]
    return NeuronSet.from_indices(kept.sort().values, neurons)
