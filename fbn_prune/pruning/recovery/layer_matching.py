"""Fit the MLPs of a cut model, layer by layer, to the outputs of the dense model's layers.

No labels are needed, and no loss of the whole model: the target is the dense layer's output on the calibration
tokens. The cut layer's input comes from the layers that are already fitted, so each layer also compensates for the
errors of the layers before it. All weights of its MLP are trained. For the output weights alone, the refit
(:mod:`fbn_prune.pruning.second_order`) solves this problem in closed form; for the input weights, no closed form
exists.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from safetensors.torch import load
from torch import Tensor
from transformers import PreTrainedModel

from fbn_prune.data.calibration import Batch
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.shards import packed
from fbn_prune.progress import StageClock
from fbn_prune.store import MATCHED_LAYERS, Store

STEP = 0.04
"""Initial step of each weight, relative to the root mean square of its matrix, so that it suits models of every size;
it falls to zero along a cosine."""

_FITS = "fits"
"""Name, among a stored layer's weights, of whether they were fitted."""


def match_layers(
    adapter: ModelAdapter,
    dense: ModelAdapter,
    batches: Sequence[Batch],
    *,
    passes: int,
    seed: int,
    clock: StageClock,
    store: Store | None = None,
) -> list[int]:
    """Fit the MLP weights of the cut model in place; all other weights stay the same.

    Parameters
    ----------
    adapter, dense
        The cut model and the dense model from which it was cut, on one device, in evaluation mode.
    batches
        One training step each; `seed` determines their order, which is new in each pass.
    passes
        Number of passes over the batches for each layer.
    store
        Keeps fitted layers, and provides those that an earlier run fitted; None keeps nothing.

    Returns
    -------
    list
        Layers that are left as they were, because their fit computed NaN or Inf.
    """
    store = store or Store()
    left: list[int] = []
    layers = adapter.num_layers
    target = LayerwiseForward(dense, batches)
    stream = LayerwiseForward(adapter, batches)
    total = sum(batch.tokens for batch in batches) * (layers * (passes + 2) - 1)
    draw = random.Random(seed)
    with _frozen(adapter.model), clock.stage("layer matching", total, "tokens x layers") as advance:

        def fitted(layer: int, order: Sequence[int]) -> dict[str, Tensor]:
            # Advance only now: layers that the store provided are in place by this time, so each runs only once.
            while stream.next_layer < layer:
                stream.advance(on_batch=advance)
            # What a layer that is left out did is for the layer before it to make up for.
            while target.next_layer <= layer or target.next_layer in adapter.left_out:
                target.advance(on_batch=advance)
            fit = _LayerFit(adapter, layer, steps=passes * len(batches))
            for index in order:
                output = stream.run_with_gradients(index)
                fit.step(_relative_error(output, target.hidden[index], batches[index]))
                advance(batches[index].tokens)
            fits = fit.finish()
            return {**_mlp_parameters(adapter, layer), _FITS: torch.tensor(fits)}

        for layer in range(layers):
            if layer in adapter.left_out:
                continue
            every = range(len(batches))
            order = [index for _ in range(passes) for index in draw.sample(every, len(every))]
            name = f"{MATCHED_LAYERS}{layer:05d}.safetensors"
            kept = store.kept(name, partial(fitted, layer, order), packed, load)
            if not bool(kept[_FITS]):
                left.append(layer)
            with torch.no_grad():
                for name, parameter in _mlp_parameters(adapter, layer).items():
                    parameter.copy_(kept[name])
    return left


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Turn gradients off for all parameters inside the context, and restore them afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _mlp_parameters(adapter: ModelAdapter, layer: int) -> dict[str, Tensor]:
    return {
        f"{projection.path} {part}": parameter.detach()
        for projection in adapter.family.projections
        for part, parameter in adapter.module(layer, projection).named_parameters()
    }


class _LayerFit:
    """Adam on float32 copies of one layer's MLP weights."""

    def __init__(self, adapter: ModelAdapter, layer: int, steps: int) -> None:
        modules = [adapter.module(layer, p) for p in adapter.family.projections]
        self._parameters = [p for module in modules for p in module.parameters()]
        self._before = [p.detach().clone() for p in self._parameters]
        self._copies = [p.detach().float().clone() for p in self._parameters]
        groups = [{"params": [copy], "lr": STEP * _scale(copy)} for copy in self._copies]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        for parameter in self._parameters:
            parameter.requires_grad_(True)

    def step(self, error: Tensor) -> None:
        gradients = torch.autograd.grad(error, self._parameters)
        for copy, gradient in zip(self._copies, gradients, strict=True):
            copy.grad = gradient.float()
        self._optimizer.step()
        self._schedule.step()
        with torch.no_grad():
            for copy, parameter in zip(self._copies, self._parameters, strict=True):
                parameter.copy_(copy)

    def finish(self) -> bool:
        """Return whether the fitted weights are finite; if they are not, the layer gets its weights back."""
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        if all(bool(parameter.isfinite().all()) for parameter in self._parameters):
            return True
        for parameter, before in zip(self._parameters, self._before, strict=True):
            parameter.copy_(before)
        return False


def _scale(parameter: Tensor) -> float:
    """Root mean square of a parameter; for a bias of zeros, a typical small weight."""
    return float(parameter.detach().square().mean().sqrt()) or 0.02


def _relative_error(output: Tensor, target: Tensor, batch: Batch) -> Tensor:
    """Mean over tokens of the squared error relative to the target's square.

    Relative, because the next layer normalises its input and a few tokens have much larger activations than the
    others.
    """
    valid = batch.valid.to(output.device)
    wanted = target[valid].float()
    error = (output[valid].float() - wanted).square().sum(-1) / wanted.square().sum(-1)
    weights = batch.token_weights
    return error.mean() if weights is None else (error * weights.to(error)).mean()
