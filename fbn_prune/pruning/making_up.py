"""Cuts of a layer that make up for what an output lacks, made when they are read.

A search reads few of the cuts that it may choose among. So a layer's activations on a few tokens are kept instead of
every cut, and a cut's fit takes the statistics of its own neurons from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fbn_prune import distributed
from fbn_prune.model.spill import Spilled
from fbn_prune.model.streaming import spilled_cuts
from fbn_prune.model.surgery import CutsOnRequest, MlpCut
from fbn_prune.pruning.damping import factored, refit_share, ridge_of
from fbn_prune.pruning.fitting import DampingNotes
from fbn_prune.pruning.statistics import CrossStatistics, GramStatistics


class Lacking:
    """A layer's activations x [tokens, neurons], and what an output lacks [tokens, d] on the same tokens.

    Parameters
    ----------
    kept
        Where the tensors are kept; several layers may share it.
    damping
        As in :func:`fbn_prune.pruning.second_order.refit`.
    scale
        The layer's factor on its MLP's output, see `LayerwiseForward.output_scale`. None if it has none: then cuts stay
        as they are.
    whole
        Output weights [d, neurons] of the uncut layer, if its cuts are to make up for the neurons that they lack as
        well, on these activations.
    """

    def __init__(
        self,
        kept: Spilled,
        layer: int,
        damping: float,
        scale: float | None,
        whole: Tensor | None = None,
    ) -> None:
        self._kept, self._layer, self._damping = kept, layer, damping
        self._scale, self._whole, self._of_whole = scale, whole, whole is not None
        self._places: list[int] = []
        self._count = 0.0
        self._energy: Tensor | None = None
        self._added = 0.0

    def update(self, lacking: Tensor, x: Tensor) -> None:
        """Add a batch's tokens."""
        if self._scale is None:
            return
        target = lacking.to(x.device).float() / self._scale
        rough = x.float()
        if self._whole is not None:
            target += rough @ self._whole.float().T
        self._count += len(x)
        energy = rough.square().sum(0, dtype=torch.float64)
        self._energy = energy if self._energy is None else self._energy + energy
        self._places.append(len(self._kept))
        self._kept.append(x)
        self._kept.append(target)

    def add_up(self, neurons: int, device: torch.device) -> None:
        """End the updates, with the sums of all processes."""
        self._whole = None  # the targets contain what it does
        if self._scale is None:
            return
        energy = self._energy
        if energy is None:  # another process has all the text
            energy = torch.zeros(neurons, dtype=torch.float64, device=device)
        (self._count,) = distributed.total(self._count)
        distributed.add_up(energy)
        self._energy = energy
        with DampingNotes().heard(self._layer):
            share = refit_share(self._damping, self._count, neurons)
        self._added = ridge_of(energy / (self._count or 1), share)

    def made_up(self, cut: MlpCut) -> MlpCut:
        """Return the cut with what is lacking fitted to its neurons; every process must ask for the same cuts."""
        if self._scale is None or self._energy is None:
            return cut
        device = self._energy.device
        kept, down = cut.kept.to(device), cut.down_weight.to(device).float()
        gram = GramStatistics(cut.width, device)
        cross = CrossStatistics(len(down), cut.width, device)
        for place in self._places:
            inner, target = self._kept[place][:, kept].float(), self._kept[place + 1]
            if self._of_whole:  # only what the cut does not do already
                target -= inner @ down.T
            gram.update(inner)
            cross.update(target, inner)
        gram.add_up()
        cross.add_up()
        with DampingNotes().heard(self._layer):  # the final fit reports its own
            factor = factored(gram.gram, self._added)
        fitted = torch.cholesky_solve(cross.cross.T, factor).T
        return replace(cut, down_weight=down + fitted)


def on_request(make: Callable[[int], MlpCut], layers: int, scratch: Path) -> CutsOnRequest:
    """Return a cut for each layer, made when it is first read and then kept on disk.

    Several processes make each at once, because their fits need one another's sums.
    """
    made, places = spilled_cuts(scratch), dict[int, int]()

    def cut(layer: int) -> MlpCut:
        if layer not in places:
            made.append(make(layer))
            places[layer] = len(made) - 1
        return made[places[layer]]

    found = CutsOnRequest(cut, layers)
    if distributed.world() > 1:
        for layer in range(layers):
            found[layer]
    return found
