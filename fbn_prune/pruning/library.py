"""The library of a search: every layer's cuts to a grid of widths."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import overload

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch, TokenBlocks
from fbn_prune.model.surgery import MlpCut
from fbn_prune.progress import StageClock
from fbn_prune.pruning.allocation import member_scores
from fbn_prune.pruning.cutting import CutPlan, TriedCuts, try_cuts
from fbn_prune.pruning.gaps import gap_cuts, whole_cuts
from fbn_prune.pruning.layout import LayoutRequest, Subject, even_layout

LEVELS = 16
"""Widths of each layer in the library, evenly spaced."""

GAP_TOKENS = 8192
"""Tokens on which layers below a gap are fitted, if so many are given."""


@dataclass(frozen=True)
class Library:
    """Cuts of every layer to a grid of widths.

    Attributes
    ----------
    widths
        For each layer the grid, ascending.
    tried
        The cuts by the level of the grid; a layer with fewer widths repeats its last one. None if layers are full or
        left out.
    cuts
        The same, or whole layers.
    below_gaps
        The same, for layers whose next one is left out; empty if no layers may be.
    """

    widths: list[list[int]]
    tried: TriedCuts[int] | None
    cuts: Sequence[Sequence[MlpCut]]
    below_gaps: Sequence[Sequence[MlpCut]] = ()

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

    def levels(self, widths: Sequence[int]) -> list[int]:
        """Return for each layer the level whose width is nearest."""
        return [
            min(range(len(grid)), key=lambda level: abs(grid[level] - width))
            for grid, width in zip(self.widths, widths, strict=True)
        ]

    def chosen(self, levels: Sequence[int], left_out: Collection[int] = ()) -> Sequence[MlpCut]:
        """Return the cuts of a model whose layers have these levels, or are left out."""
        below = {layer - 1 for layer in left_out}
        cuts = [
            (self.below_gaps if layer in below else self.cuts)[level]
            for layer, level in enumerate(levels)
        ]
        return _OnePerLayer(cuts)


class _OnePerLayer(Sequence[MlpCut]):
    """One cut for each layer, from a sequence of its own, read when it is needed."""

    def __init__(self, cuts: Sequence[Sequence[MlpCut]]) -> None:
        self._cuts = cuts

    def __len__(self) -> int:
        return len(self._cuts)

    @overload
    def __getitem__(self, index: int) -> MlpCut: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[MlpCut]: ...
    def __getitem__(self, index: int | slice) -> MlpCut | Sequence[MlpCut]:
        if isinstance(index, slice):
            return [self[layer] for layer in range(*index.indices(len(self)))]
        return self._cuts[index][index]


def library_bytes(request: LayoutRequest, hidden: int, itemsize: int) -> int:
    """Return the bytes on disk that a library takes, with `hidden` output weights per neuron."""
    sets = 2 if request.rest else 1  # with those of layers below gaps
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
    """Cut every layer to each width of the grid, and, if layers may be left out, once more for a gap above it."""
    widths = grid(request)
    cuts: Sequence[Sequence[MlpCut]]
    tried = None
    if request.narrows:
        tried = _tried_widths(subject, text.batches(subject.batch_tokens), widths, clock)
        cuts = [*tried.cuts.values()]
    else:
        cuts = [whole_cuts(subject.adapter, subject.scratch)]
    if not request.rest:
        return Library(widths, tried, cuts)
    few = text.subset(GAP_TOKENS).batches(subject.batch_tokens)
    total = sum(batch.tokens for batch in distributed.share(few)) * subject.adapter.num_layers
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
    return Library(widths, tried, cuts, below)


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
