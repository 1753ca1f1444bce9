"""Cuts of layers below a gap: besides their own work they make up for a layer above them that is left out.

A layer that is left out returns its input, so the hidden state lacks what it would have added. The layer below can add
a part of that: the output weights get the least-squares fit of what is lacking to the activations. Measured without it,
leaving out a layer would seem far more expensive than it is once the model is refitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.spill import Spilled
from fbn_prune.model.streaming import SpilledCuts, spilled_cuts
from fbn_prune.model.surgery import MlpCut, rounded_cut
from fbn_prune.progress import Advance
from fbn_prune.pruning.damping import factored, refit_share, ridge
from fbn_prune.pruning.fitting import DampingNotes
from fbn_prune.pruning.statistics import CrossStatistics, GramStatistics


def gap_cuts(
    adapter: ModelAdapter,
    batches: Sequence[Batch],
    cuts: Sequence[Sequence[MlpCut]],
    *,
    damping: float,
    round_to: torch.dtype,
    scratch: Path,
    advance: Advance,
) -> list[SpilledCuts[MlpCut]]:
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
    found = [spilled_cuts(scratch) for _ in cuts]
    below: _Below | None = None
    for layer in range(adapter.num_layers):
        spilled = adapter.spill()
        here = _Below(shared_scale(forward.output_scale()), [] if spilled is None else spilled)
        lacking = None
        if below is not None:
            width, device = cuts[-1][layer - 1].width, adapter.layer_device(layer - 1)
            lacking = Lacking(adapter.hidden_size, width, device)
        for index, batch in enumerate(own):
            entered = forward.hidden[index]
            output = forward.run(index, lambda _, x, here=here: here.activations.append(x))  # type: ignore[misc]
            if below is not None and lacking is not None:
                valid = batch.valid.to(output.device)
                lacking.update(
                    output[valid] - entered.to(output.device)[valid], below.activations[index]
                )
            forward.hidden[index] = output
            advance(batch.tokens)
        forward.next_layer += 1
        if below is not None and lacking is not None:
            base = [each[layer - 1] for each in cuts]
            with DampingNotes().heard(layer):  # the final fit reports its own
                made = lacking.made_up(base, below.scale, damping)
            for level, cut in enumerate(made):
                found[level].append(rounded_cut(cut, round_to))
        below = here
    for level, each in enumerate(cuts):
        found[level].append(each[adapter.num_layers - 1])
    return found


@dataclass(frozen=True)
class _Below:
    """A layer's factor on its MLP's output, see `LayerwiseForward.output_scale`, and its activations by batch."""

    scale: float | None
    activations: list[Tensor] | Spilled


class Lacking:
    """Statistics of a layer's activations x [tokens, neurons] and of what an output lacks [tokens, d]."""

    def __init__(self, hidden: int, neurons: int, device: torch.device) -> None:
        self._gram = GramStatistics(neurons, device)
        self._cross = CrossStatistics(hidden, neurons, device)

    def update(self, lacking: Tensor, x: Tensor) -> None:
        """Add a batch's tokens."""
        self._gram.update(x)
        self._cross.update(lacking.to(x.device), x)

    def made_up(
        self,
        cuts: Sequence[MlpCut],
        scale: float | None,
        damping: float,
        whole: Tensor | None = None,
    ) -> list[MlpCut]:
        """Return the cuts with what is lacking, divided by `scale`, fitted to their neurons; None changes nothing.

        With `whole`, the output weights [d, neurons] of the uncut layer, they also make up for the neurons that they
        lack, on these activations.
        """
        self._gram.add_up()
        self._cross.add_up()
        if scale is None:
            return list(cuts)
        gram, cross = self._gram.gram, self._cross.cross / scale
        if whole is not None:
            cross = cross + whole.to(gram) @ gram
        share = refit_share(damping, self._gram.count, len(gram))
        added = ridge(gram, share)
        order = _nested(cuts)
        # Of nested cuts, one Cholesky factor holds those of all in its upper left corner.
        factor = None if order is None else factored(gram[order][:, order], added)
        found: list[MlpCut] = []
        for cut in cuts:
            if order is None or factor is None:
                inner = cut.kept.to(gram.device)
                own = factored(gram[inner][:, inner], added)
            else:
                inner, own = order[: cut.width].to(gram.device), factor[: cut.width, : cut.width]
            back, down = inner.argsort(), cut.down_weight.to(gram)
            target = cross[:, inner]
            if whole is not None:  # only what the cut does not do already
                target = target - down[:, back.argsort()] @ gram[inner][:, inner]
            fitted = torch.cholesky_solve(target.T, own).T
            found.append(replace(cut, down_weight=down + fitted[:, back]))
        return found


def _nested(cuts: Sequence[MlpCut]) -> Tensor | None:
    """The neurons, those of narrower cuts first; None if a cut has neurons that the next one lacks."""
    order = cuts[0].kept
    for cut in cuts[1:]:
        order = torch.cat([order, cut.kept[~torch.isin(cut.kept, order)]])
        if len(order) != cut.width:
            return None
    return order


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
