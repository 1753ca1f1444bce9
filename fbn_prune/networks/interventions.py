"""Change what chosen neurons do while a model runs, without touching or copying its weights.

Silencing the neurons of a functional network, keeping none but them, and driving them harder are the causal tests of
arXiv 2502.20408. An activation set to zero before the output projection contributes what a zero column would:
masking by hook and zeroing the weights are the same function. Hooks leave when the context does, however it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter


@contextmanager
def masked(adapter: ModelAdapter, silent: Sequence[Tensor]) -> Iterator[None]:
    """Silence neurons inside the context.

    Parameters
    ----------
    silent
        For each layer a bool mask [neurons], true where a neuron is to be silent;
        `FunctionalNetworks.by_layer` makes it of one over all neurons.

    Raises
    ------
    InvalidInput
        The masks are not one for each layer, or not bool of the layer's width.
    """
    with _changed(adapter, silent, lambda x, mask: x.masked_fill(mask, 0)):
        yield


@contextmanager
def retained(adapter: ModelAdapter, kept: Sequence[Tensor]) -> Iterator[None]:
    """Silence all neurons but `kept` (masks as in :func:`masked`) inside the context."""
    with masked(adapter, [~mask for mask in kept]):
        yield


@contextmanager
def amplified(adapter: ModelAdapter, chosen: Sequence[Tensor], factor: float) -> Iterator[None]:
    """Multiply the activations of `chosen` neurons (masks as in :func:`masked`) inside the context.

    With `factor` 1 every logit stays the same to the bit; with 0 this is :func:`masked` on finite activations.
    """
    with _changed(adapter, chosen, lambda x, mask: torch.where(mask, x * factor, x)):
        yield


@contextmanager
def _changed(
    adapter: ModelAdapter,
    masks: Sequence[Tensor],
    change: Callable[[Tensor, Tensor], Tensor],
) -> Iterator[None]:
    """Replace the activations x of every layer whose mask is not empty by ``change(x, mask)``."""
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
            down = adapter.output_module(layer)
            hook = _hook(mask.to(adapter.layer_device(layer)), change)
            hooks.callback(down.register_forward_pre_hook(hook).remove)
        yield


def _hook(
    mask: Tensor, change: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (change(args[0], mask), *args[1:])

    return hook
