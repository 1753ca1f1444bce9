"""The decoder layers of a tiny copy and their linear maps, whatever they are called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fbn_prune.model.tiny_copy import VOCABULARY

LENGTH = 6
"""Tokens of the texts on which a copy is tried out."""


class NotFound(Exception):
    """The reason why an architecture cannot be pruned, as a predicate that follows its model_type."""


def text(seed: int) -> Tensor:
    """Return random tokens, int64 [1, LENGTH]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY - 3, (1, LENGTH), generator=generator)


def run(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the logits of token ids, without a cache."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def decoder_layers(model: PreTrainedModel, ids: Tensor) -> tuple[str, list[nn.Module]]:
    """Return the longest list of modules that a forward pass of text calls, and that hold linear maps, with its path.

    Raises
    ------
    NotFound
        There is no such list.
    """
    called: set[nn.Module] = set()
    with ExitStack() as hooks:
        for module in model.modules():
            hook = module.register_forward_pre_hook(lambda module, args: called.add(module))
            hooks.callback(hook.remove)
        run(model, ids)
    lists: list[tuple[str, list[nn.Module]]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(
            name.startswith(f"{outer}.") for outer, _ in lists
        ):
            continue
        layers = list(module)
        if layers and all(layer in called and list(linears(layer)) for layer in layers):
            lists.append((name, layers))
    if not lists:
        raise NotFound("has no list of decoder layers")
    return max(lists, key=lambda each: len(each[1]))


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module's linear maps with their paths."""
    for name, each in module.named_modules():
        weight = getattr(each, "weight", None)
        if isinstance(each, nn.Linear | Conv1D) and weight is not None and weight.ndim == 2:
            yield name, each


def neuron_axis(module: nn.Module, reads: bool) -> Literal[0, 1]:
    """The axis of the weight along the map's output channels, or if `reads` along its input channels."""
    return 1 if isinstance(module, Conv1D) is not reads else 0


def channels(module: nn.Module, reads: bool = False) -> int:
    """Number of channels that a linear map computes, or reads."""
    weight: Any = module.weight
    return int(weight.shape[neuron_axis(module, reads)])
