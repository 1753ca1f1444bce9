"""Backward passes in less memory: what a layer computes inside is computed again when the gradients need it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Keep only the layers' inputs for a backward pass inside the context (gradient checkpointing, arXiv 1604.06174).

    A backward pass then takes one more forward pass. The same operations run on the same inputs again, so the gradients
    are the same.

    Parameters
    ----------
    layers
        Modules of any family, in evaluation mode: nothing in them may draw random numbers.
    """
    before = [(layer, layer.__dict__.get("forward")) for layer in layers]
    for layer, _ in before:
        again = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        layer.forward = again
    try:
        yield
    finally:
        for layer, forward in before:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
