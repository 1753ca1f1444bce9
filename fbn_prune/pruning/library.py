"""The library of a search: every layer's cuts to a grid of widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch, TokenBlocks
from fbn_prune.model.surgery import CutsOnRequest, MlpCut
from fbn_prune.progress import StageClock
from fbn_prune.pruning.allocation import member_scores
from fbn_prune.pruning.candidates import Sizes
from fbn_prune.pruning.cutting import CutPlan, TriedCuts, try_cuts
from fbn_prune.pruning.gaps import gap_cuts, whole_cuts
from fbn_prune.pruning.head_cuts import cuts_with_fewer_heads
from fbn_prune.pruning.layout import LayoutRequest, Subject, even_layout

LEVELS = 16
"""Widths of each layer in the library, evenly spaced."""

GAP_TOKENS = 8192
"""Tokens on which layers below a gap, and layers with fewer heads, are fitted, if so many are given."""


@dataclass(frozen=True)
class Library:
    """Cuts of every layer to a grid of widths.

    Attributes
    ----------
    widths
        For each layer the grid, ascending.
    tried
        The cuts by the place in the grid; a layer with fewer widths repeats its last one. None if layers are full or
        left out.
    cuts
        The same, or whole layers.
    below_gaps
        The same, for layers whose next one is left out; empty if no layers may be.
    fewer_heads
        The same, for layers with each number of attention heads of the request but the last.
    """

    widths: list[list[int]]
    tried: TriedCuts[int] | None
    cuts: Sequence[Sequence[MlpCut]]
    below_gaps: Sequence[Sequence[MlpCut]] = ()
    fewer_heads: Sequence[Sequence[Sequence[MlpCut]]] = ()

    @property
    def errors(self) -> list[list[float]]:
        """For each layer the error of its output at each width of its grid, weighted by the loss if that is asked for;
        empty if layers are full or left out."""
        if (tried := self.tried) is None:
            return []
        return [
            [tried.errors[level][layer].weighted for level in range(len(grid))]
            for layer, grid in enumerate(self.widths)
        ]

    def places(self, widths: Sequence[int]) -> list[int]:
        """Return for each layer the place in its grid of the width that is nearest."""
        return [
            min(range(len(grid)), key=lambda place: abs(grid[place] - width))
            for grid, width in zip(self.widths, widths, strict=True)
        ]

    def with_heads(self, level: int) -> Sequence[MlpCut]:
        """Return the cuts of all layers to this level of heads, with the widest MLPs."""
        return self.fewer_heads[level][-1]

    def narrowed(self, places: Sequence[int]) -> Sequence[MlpCut]:
        """Return the cuts of layers whose widths are at these places of the grid, and that keep all else."""
        return CutsOnRequest(lambda layer: self.cuts[places[layer]][layer], len(places))

    def chosen(self, sizes: Sizes) -> Sequence[MlpCut]:
        """Return the cuts of a model of these sizes."""
        places, left_out = self.places(sizes.widths), sizes.left_out

        def cut(layer: int) -> MlpCut:
            place, heads = places[layer], sizes.heads[layer] if sizes.heads else None
            found = plain = self.cuts[place][layer]
            if layer + 1 in left_out:
                found = self.below_gaps[place][layer]
            if heads is None or heads == len(self.fewer_heads):
                return found
            fewer = self.fewer_heads[heads][place][layer]
            if found is plain:
                return fewer
            # It makes up for both; the cuts have the same neurons, and each change of weights is added.
            change = found.down_weight.float() - plain.down_weight.float()
            return replace(fewer, down_weight=fewer.down_weight.float() + change)

        return CutsOnRequest(cut, len(places))


def library_bytes(request: LayoutRequest, hidden: int, itemsize: int) -> int:
    """Return the bytes on disk that a library takes, with `hidden` output weights per neuron."""
    sets = 2 if request.leaves_out else 1  # with those of layers below gaps
    if request.heads is not None:
        sets += len(request.heads.groups) - 1
    return sets * sum(sum(layer) for layer in grid(request)) * hidden * itemsize


def grid(request: LayoutRequest) -> list[list[int]]:
    """Return for each layer the widths of its cuts, ascending, with its even width and its full one."""
    even = even_layout(request)
    found: list[list[int]] = []
    for layer, full in enumerate(request.full):
        if layer in request.whole or not request.narrows:
            found.append([full])
            continue
        step = full / LEVELS
        steps = (
            round(step * level / request.multiple) * request.multiple for level in range(1, LEVELS)
        )
        widths = {min(max(width, request.multiple), full) for width in steps}
        found.append(sorted(widths | {even[layer], full}))
    return found


def make_library(
    subject: Subject, text: TokenBlocks, request: LayoutRequest, clock: StageClock
) -> Library:
    """Cut every layer to each width of the grid.

    If layers or attention heads may go, also cut them for a gap above, and with each smaller number of heads.
    """
    widths = grid(request)
    cuts: Sequence[Sequence[MlpCut]]
    tried = None
    if request.narrows:
        tried = _tried_widths(subject, text.batches(subject.batch_tokens), widths, clock)
        cuts = [*tried.cuts.values()]
    else:
        cuts = [whole_cuts(subject.adapter, subject.scratch)]
    few = text.subset(GAP_TOKENS).batches(subject.batch_tokens)
    total = sum(batch.tokens for batch in distributed.share(few)) * subject.adapter.num_layers
    below: Sequence[Sequence[MlpCut]] = ()
    if request.leaves_out:
        with clock.stage("gaps", total, "tokens x layers") as advance:
            below = gap_cuts(
                subject.adapter,
                few,
                cuts,
                damping=subject.options.refit_damping,
                round_to=subject.options.round_to,
                scratch=subject.scratch,
                advance=advance,
            )
    fewer: Sequence[Sequence[Sequence[MlpCut]]] = ()
    if (heads := request.heads) is not None:
        with clock.stage("heads", len(heads.groups) * total, "tokens x layers") as advance:
            fewer = cuts_with_fewer_heads(
                subject.adapter,
                few,
                cuts,
                heads,
                subject.options,
                scratch=subject.scratch,
                advance=advance,
            )
    return Library(widths, tried, cuts, below, fewer)


def _tried_widths(
    subject: Subject, batches: Sequence[Batch], widths: list[list[int]], clock: StageClock
) -> TriedCuts[int]:
    levels = range(max(map(len, widths)))
    members = None
    if subject.networks is not None:
        members = member_scores(subject.networks, subject.kept)
    plans = {
        level: CutPlan(
            subject.criterion, [layer[min(level, len(layer) - 1)] for layer in widths], members
        )
        for level in levels
    }
    return try_cuts(  # the final cut reports the same changes of damping
        subject.adapter,
        batches,
        plans,
        subject.options,
        loss_roots=subject.loss_roots if subject.options.loss_aware else None,
        scratch=subject.scratch,
        clock=clock,
        stage="library",
        errors=True,
    )
