"""Change what chosen neurons do while a model runs, without touching its weights.

An activation set to zero before the output projection contributes what a zero column would: masking by hook and
zeroing the weights are the same function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fbn_prune.model.families import Family


@contextmanager
def masked(model: PreTrainedModel, family: Family, silent: Sequence[Tensor]) -> Iterator[None]:
    """Silence neurons inside the context.

    Parameters
    ----------
    silent
        For each layer a bool mask [neurons], true where a neuron is to be silent.
    """
    handles = []
    for layer, mask in enumerate(silent):
        if not bool(mask.any()):
            continue
        down = family.output_module(model, layer)
        handles.append(down.register_forward_pre_hook(_silence(mask.to(_device_of(down)))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _silence(mask: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].masked_fill(mask, 0), *args[1:])

    return hook


def _device_of(module: nn.Module) -> Any:
    return next(module.parameters()).device
