"""Cuts of layers below a gap: besides their own work they make up for a layer above them that is left out.

A layer that is left out returns its input, so the hidden state lacks what it would have added. The layer below can add
a part of that: the output weights get the least-squares fit of what is lacking to the activations. Measured without it,
leaving out a layer would seem far more expensive than it is once the model is refitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.spill import Spilled
from fbn_prune.model.streaming import SpilledCuts, spilled_cuts
from fbn_prune.model.surgery import CutsOnRequest, MlpCut, rounded_cut
from fbn_prune.progress import Advance
from fbn_prune.pruning.making_up import Lacking, on_request


def gap_cuts(
    adapter: ModelAdapter,
    batches: Sequence[Batch],
    cuts: Sequence[Sequence[MlpCut]],
    *,
    damping: float,
    round_to: torch.dtype,
    scratch: Path,
    advance: Advance,
) -> list[CutsOnRequest]:
    """Return cuts like these, of layers whose next layer is left out.

    Parameters
    ----------
    batches
        Text to fit them to.
    cuts
        For some levels, from the narrowest to the widest, one cut for each layer.
    damping
        As in :func:`fbn_prune.pruning.second_order.refit`.
    round_to
        The dtype of the checkpoint to be written.
    advance
        Called with the number of tokens after each batch of a layer.
    """
    own = distributed.share(batches)
    forward = LayerwiseForward(adapter, own)
    kept = Spilled(scratch)
    lacking: list[Lacking] = []
    below: _Below | None = None
    for layer in range(adapter.num_layers):
        spilled = adapter.spill()
        here = _Below(shared_scale(forward.output_scale()), [] if spilled is None else spilled)
        missed = None if below is None else Lacking(kept, layer - 1, damping, below.scale)
        for index, batch in enumerate(own):
            entered = forward.hidden[index]
            output = forward.run(index, lambda _, x, here=here: here.activations.append(x))  # type: ignore[misc]
            if below is not None and missed is not None:
                valid = batch.valid.to(output.device)
                missed.update(
                    output[valid] - entered.to(output.device)[valid], below.activations[index]
                )
            forward.hidden[index] = output
            advance(batch.tokens)
        forward.next_layer += 1
        if missed is not None:
            missed.add_up(cuts[-1][layer - 1].width, adapter.layer_device(layer - 1))
            lacking.append(missed)
        below = here

    def cut(level: int, layer: int) -> MlpCut:
        base = cuts[level][layer]
        if layer == len(lacking):  # no layer is above it
            return base
        return rounded_cut(lacking[layer].made_up(base), round_to)

    return [
        on_request(partial(cut, level), adapter.num_layers, scratch) for level in range(len(cuts))
    ]


@dataclass(frozen=True)
class _Below:
    """A layer's factor on its MLP's output, see `LayerwiseForward.output_scale`, and its activations by batch."""

    scale: float | None
    activations: list[Tensor] | Spilled


def shared_scale(scale: float | None) -> float | None:
    """Return the scale that the processes with text have found; None if they found none."""
    found, processes = distributed.total(scale or 0.0, float(scale is not None))
    return found / processes if processes else None


def whole_cuts(adapter: ModelAdapter, scratch: Path) -> SpilledCuts[MlpCut]:
    """Return cuts that keep every neuron as it is."""
    found = spilled_cuts(scratch)
    for weight in adapter.down_weights():
        found.append(MlpCut(torch.arange(weight.shape[1]), weight.detach().float().cpu()))
    return found
