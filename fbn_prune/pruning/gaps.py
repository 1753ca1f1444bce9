"""Cuts of layers below a gap: besides their own work they make up for a layer above them that is left out.

A layer that is left out returns its input, so the hidden state lacks what it would have added. The layer below can add
a part of that: the output weights get the least-squares fit of what is lacking to the activations. Without it, the
measured cost of leaving out a layer is up to ten times what it is once the model is refitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.layerwise import LayerwiseForward
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
        For some levels, from the narrowest to the widest, one cut for each layer. The neurons of a level are among
        those of the next one.
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
    below: tuple[list[Tensor], float | None] | None = None
    for layer in range(adapter.num_layers):
        scale = forward.output_scale()
        entered = [forward.hidden[index] for index in range(len(own))]
        seen: list[Tensor] = []
        forward.advance(lambda _, x, seen=seen: seen.append(x), on_batch=advance)  # type: ignore[misc]
        if below is not None:
            statistics = _Lacking(
                adapter.hidden_size, cuts[-1][layer - 1].width, adapter.layer_device(layer - 1)
            )
            for index, (x, batch) in enumerate(zip(below[0], own, strict=True)):
                after = forward.hidden[index]
                added = after - entered[index].to(after.device)
                statistics.update(added[batch.valid.to(added.device)], x)
            base = [each[layer - 1] for each in cuts]
            with DampingNotes().heard(layer):  # the final fit reports its own
                made = statistics.made_up(base, below[1], damping)
            for level, cut in enumerate(made):
                found[level].append(rounded_cut(cut, round_to))
        below = seen, scale
    for level, each in enumerate(cuts):
        found[level].append(each[adapter.num_layers - 1])
    return found


class _Lacking:
    """Statistics of a layer's activations x [tokens, neurons] and of what is lacking above it [tokens, d]."""

    def __init__(self, hidden: int, neurons: int, device: torch.device) -> None:
        self._gram = GramStatistics(neurons, device)
        self._cross = CrossStatistics(hidden, neurons, device)

    def update(self, lacking: Tensor, x: Tensor) -> None:
        self._gram.update(x)
        self._cross.update(lacking.to(x.device), x)

    def made_up(self, cuts: Sequence[MlpCut], scale: float | None, damping: float) -> list[MlpCut]:
        """Return the cuts with what is lacking, divided by `scale`, fitted to their neurons; None changes nothing."""
        self._gram.add_up()
        self._cross.add_up()
        if scale is None:
            return list(cuts)
        gram, cross = self._gram.gram, self._cross.cross / scale
        share = refit_share(damping, self._gram.count, len(gram))
        order = _nested(cuts).to(gram.device)
        # One Cholesky factor holds those of all cuts in its upper left corner.
        factor = factored(gram[order][:, order], ridge(gram, share))
        found: list[MlpCut] = []
        for cut in cuts:
            inner, size = order[: cut.width], cut.width
            fitted = torch.cholesky_solve(cross[:, inner].T, factor[:size, :size]).T
            down = cut.down_weight.to(fitted) + fitted[:, inner.argsort()]
            found.append(MlpCut(cut.kept, down, cut.down_bias))
        return found


def _nested(cuts: Sequence[MlpCut]) -> Tensor:
    """The neurons, those of narrower cuts first.

    Raises
    ------
    ValueError
        The neurons of a cut are not among those of the next one.
    """
    order = cuts[0].kept
    for cut in cuts[1:]:
        more = cut.kept[~torch.isin(cut.kept, order)]
        order = torch.cat([order, more])
        if len(order) != cut.width:
            raise ValueError("the neurons of a cut are not among those of the next one")
    return order


def whole_cuts(adapter: ModelAdapter, scratch: Path) -> SpilledCuts[MlpCut]:
    """Return cuts that keep every neuron as it is."""
    found = spilled_cuts(scratch)
    for weight in adapter.down_weights():
        found.append(MlpCut(torch.arange(weight.shape[1]), weight.detach().float().cpu()))
    return found
