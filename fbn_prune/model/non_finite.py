"""Explain NaN and Inf: find the first layer that computes them, and name the likely cause."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fbn_prune.data.calibration import Batch
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.layerwise import LayerwiseForward

BLOCKS_SEARCHED = 4


def damage(adapter: ModelAdapter, batches: Sequence[Batch]) -> InvalidInput:
    """Return the error for a model that computes NaN or Inf.

    It names the first layer whose activations are not finite, or the logits, and the likely cause: a damaged
    checkpoint, or a compute dtype with too small a range.
    """
    dtype = str(adapter.dtype).removeprefix("torch.")
    cause = "the checkpoint is damaged: download it again"
    if dtype != "float32":
        cause += f", or {dtype} overflows (try --dtype float32)"
    first = batches[0]
    few = Batch(first.input_ids[:BLOCKS_SEARCHED], first.valid[:BLOCKS_SEARCHED])
    stream = LayerwiseForward(adapter, [few])
    for layer in range(adapter.num_layers):
        finite: list[bool] = []
        stream.advance(lambda _, x, finite=finite: finite.append(bool(torch.isfinite(x).all())))  # type: ignore[misc]
        if not all(finite):
            return InvalidInput(f"NaN or Inf among the MLP activations of layer {layer}: {cause}")
    return InvalidInput(f"NaN or Inf among the model's logits: {cause}")
