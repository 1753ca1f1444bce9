"""Change the activations of chosen neurons while a model runs, without changing or copying its weights.

Masking the neurons of a functional network, retaining only these neurons, and amplifying them are the causal tests of
arXiv 2502.20408. A forward hook changes the input of the output projection: an activation of zero there has the same
effect as a zero column in the weights. The hooks are removed when the context ends, also by an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter


@contextmanager
def masked(adapter: ModelAdapter, silent: Sequence[Tensor]) -> Iterator[None]:
    """Set the activations of chosen neurons to zero inside the context.

    Parameters
    ----------
    silent
        One mask, bool [neurons], for each layer: true for a neuron to silence. `FunctionalNetworks.by_layer` splits a
        mask over all neurons into these.

    Raises
    ------
    InvalidInput
        There is not one mask for each layer, or a mask is not bool or not of the layer's width.
    """
    with _changed(adapter, silent, lambda x, mask: x.masked_fill(mask, 0)):
        yield


@contextmanager
def retained(adapter: ModelAdapter, kept: Sequence[Tensor]) -> Iterator[None]:
    """Set the activations of all neurons but `kept` to zero inside the context; see :func:`masked`."""
    with masked(adapter, [~mask for mask in kept]):
        yield


@contextmanager
def amplified(adapter: ModelAdapter, chosen: Sequence[Tensor], factor: float) -> Iterator[None]:
    """Multiply the activations of `chosen` neurons by `factor` inside the context; see :func:`masked` for the masks.

    Factor 1 leaves every logit unchanged to the bit; factor 0 equals :func:`masked` where activations are finite.
    """
    with _changed(adapter, chosen, lambda x, mask: torch.where(mask, x * factor, x)):
        yield


@contextmanager
def _changed(
    adapter: ModelAdapter,
    masks: Sequence[Tensor],
    change: Callable[[Tensor, Tensor], Tensor],
) -> Iterator[None]:
    """Replace the activations x of every layer with a non-empty mask by ``change(x, mask)``."""
    layers = adapter.num_layers
    if len(masks) != layers:
        raise InvalidInput(f"{len(masks)} masks of neurons for a model of {layers} layers")
    with ExitStack() as hooks:
        for layer, mask in enumerate(masks):
            width = adapter.down_weight(layer).shape[1]
            if mask.dtype != torch.bool or tuple(mask.shape) != (width,):
                raise InvalidInput(
                    f"the mask of layer {layer} is {mask.dtype} {tuple(mask.shape)}, "
                    f"not torch.bool ({width},)"
                )
            if not bool(mask.any()):
                continue
            mask = mask.to(adapter.layer_device(layer))
            changing = adapter.change_neurons(layer, lambda x, mask=mask: change(x, mask))  # type: ignore[misc]
            hooks.callback(changing.remove)
        yield
