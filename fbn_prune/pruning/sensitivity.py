"""Sensitivity of the loss to errors at each MLP's output: F = E[g gᵀ], where g is the loss gradient there.

To second order, with the Fisher information as the Hessian, an error e at the output of a layer's MLP raises the loss
by ``eᵀ F e / 2``. One backward pass over a sample of the calibration text gives F for all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fbn_prune.data.calibration import Batch
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.progress import StageClock

GRADIENT_TOKENS = 32768
"""Tokens of the backward pass, which takes the time; F [d, d] is accurate with a few tokens for each of its d
directions."""


def output_sensitivity(
    adapter: ModelAdapter, batches: Sequence[Batch], clock: StageClock
) -> list[Tensor]:
    """Return F of each layer, float64 [d, d] on the layer's device.

    Parameters
    ----------
    batches
        Small batches, because a backward pass holds the activations of a whole batch.

    Raises
    ------
    InvalidInput
        A gradient is NaN or Inf.
    """
    layers = adapter.num_layers
    device = adapter.device
    size = adapter.hidden_size
    sums = [
        torch.zeros(size, size, dtype=torch.float64, device=adapter.layer_device(layer))
        for layer in range(layers)
    ]
    tokens = sum(batch.tokens for batch in batches)
    with clock.stage("gradients", tokens, "tokens") as advance, _recording(adapter, sums):
        for batch in batches:
            ids = batch.input_ids.to(device)
            targets = ids[:, 1:].masked_fill(~batch.valid[:, 1:].to(device), -100)
            logits = adapter.model(input_ids=ids, use_cache=False).logits[:, :-1]
            cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"
            ).backward()
            advance(batch.tokens)
    for layer, total in enumerate(sums):
        if not bool(torch.isfinite(total).all()):
            raise InvalidInput(
                f"NaN or Inf among the loss gradients of layer {layer}: compute in --dtype float32"
            )
    return [total / tokens for total in sums]


@contextmanager
def _recording(adapter: ModelAdapter, sums: list[Tensor]) -> Iterator[None]:
    """Let gradients flow to activations only, and sum their outer products at the MLP outputs in `sums`."""
    trained = [parameter for parameter in adapter.model.parameters() if parameter.requires_grad]
    handles = [adapter.model.get_input_embeddings().register_forward_hook(_start_graph)]
    for layer, total in enumerate(sums):
        hook = _watch(total)
        handles.append(adapter.output_module(layer).register_forward_hook(hook))
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()


def _start_graph(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.detach().requires_grad_().clone()


def _watch(total: Tensor) -> Any:
    def add(gradient: Tensor) -> None:
        rows = gradient.flatten(0, -2).float()
        total.add_((rows.T @ rows).double())

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        output = output.clone()  # some architectures add to the output in place
        output.register_hook(add)
        return output

    return hook
