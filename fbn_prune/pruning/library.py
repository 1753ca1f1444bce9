"""The library of a search: every layer's cuts to a grid of widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch, TokenBlocks
from fbn_prune.model.surgery import CutsOnRequest, MlpCut
from fbn_prune.progress import StageClock
from fbn_prune.pruning.allocation import member_scores
from fbn_prune.pruning.candidates import Sizes
from fbn_prune.pruning.cutting import CutPlan, TriedCuts, try_cuts
from fbn_prune.pruning.gaps import gap_cuts, whole_cuts
from fbn_prune.pruning.head_cuts import cuts_with_fewer_heads
from fbn_prune.pruning.layout import HeadLevels, LayoutRequest, Subject, even_layout

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
    measured
        What single cuts cost, for each layer, by what they are; searches that share the library share it.
    """

    widths: list[list[int]]
    tried: TriedCuts[int] | None
    cuts: Sequence[Sequence[MlpCut]]
    below_gaps: Sequence[Sequence[MlpCut]] = ()
    fewer_heads: Sequence[Sequence[Sequence[MlpCut]]] = ()
    measured: dict[object, list[float]] = field(default_factory=dict)

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

    def narrowed_to(self, widths: list[list[int]]) -> Library:
        """Return the part of the library with these widths, all of which it must have."""
        places = [
            [own.index(width) for width in wanted]
            for own, wanted in zip(self.widths, widths, strict=True)
        ]

        def at(level: int, layer: int) -> int:
            return places[layer][min(level, len(places[layer]) - 1)]

        def of(cuts: Sequence[Sequence[MlpCut]]) -> list[Sequence[MlpCut]]:
            return [
                CutsOnRequest(partial(_cut_at, cuts, partial(at, level)), len(places))
                for level in levels
            ]

        levels = range(max(map(len, places)))
        tried = None if self.tried is None else self.tried.picked(at, levels)
        return replace(
            self,
            widths=widths,
            tried=tried,
            cuts=of(self.cuts),
            below_gaps=of(self.below_gaps) if self.below_gaps else (),
            fewer_heads=[of(each) for each in self.fewer_heads],
        )

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


def library_bytes(request: LayoutRequest, hidden: int, itemsize: int, tokens: int) -> int:
    """Return the most bytes on disk that a library takes, with `hidden` output weights per neuron."""
    more = 1 if request.leaves_out else 0  # cuts of layers below gaps
    if request.heads is not None:
        more += len(request.heads.groups) - 1
    cuts = sum(sum(layer) for layer in grid(request)) * hidden * itemsize
    # What further cuts are made from: each layer's activations on a few tokens, and what its output lacks on them.
    each_token = sum(request.full) * itemsize + len(request.full) * hidden * 4
    return (1 + more) * cuts + more * min(tokens, GAP_TOKENS) * each_token


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
    shelf = _shelf.get()
    return (shelf or Shelf([request])).library(subject, text, request, clock)


class Shelf:
    """Keeps the library of searches that differ in nothing but their budgets and in what may go besides neurons.

    Parameters
    ----------
    requests
        Those of all searches: each has its own even widths.
    """

    def __init__(self, requests: Sequence[LayoutRequest]) -> None:
        self._requests = requests
        self._made: dict[object, Library] = {}

    def library(
        self, subject: Subject, text: TokenBlocks, request: LayoutRequest, clock: StageClock
    ) -> Library:
        """Return the library of a request, of which only what is not known yet is made."""
        grids = [grid(one) for one in self._requests if one.narrows == request.narrows]
        widths = [sorted(set().union(*each)) for each in zip(*grids, grid(request), strict=True)]
        options = replace(subject.options, sequential=False, head_groups=None)
        key = text.fingerprint, subject.criterion, options, request.narrows, str(widths)
        made = self._made.get(key) or _library(subject, text, request, widths, clock)
        few = text.subset(GAP_TOKENS).batches(subject.batch_tokens)
        if request.leaves_out and not made.below_gaps:
            made = replace(made, below_gaps=_below_gaps(subject, few, made.cuts, clock))
        if request.heads is not None and not made.fewer_heads:
            fewer = _fewer_heads(subject, few, made.cuts, request.heads, clock)
            made = replace(made, fewer_heads=fewer)
        self._made[key] = made
        return made if made.widths == grid(request) else made.narrowed_to(grid(request))


_shelf: ContextVar[Shelf | None] = ContextVar("shelf", default=None)


@contextmanager
def one_library(requests: Sequence[LayoutRequest]) -> Iterator[None]:
    """Let searches in the context share what does not depend on their budgets; see :class:`Shelf`."""
    token = _shelf.set(Shelf(requests))
    try:
        yield
    finally:
        _shelf.reset(token)


def _cut_at(cuts: Sequence[Sequence[MlpCut]], place: Callable[[int], int], layer: int) -> MlpCut:
    return cuts[place(layer)][layer]


def _library(
    subject: Subject,
    text: TokenBlocks,
    request: LayoutRequest,
    widths: list[list[int]],
    clock: StageClock,
) -> Library:
    if not request.narrows:
        return Library(widths, None, [whole_cuts(subject.adapter, subject.scratch)])
    tried = _tried_widths(subject, text.batches(subject.batch_tokens), widths, clock)
    return Library(widths, tried, [*tried.cuts.values()])


def _below_gaps(
    subject: Subject,
    few: Sequence[Batch],
    cuts: Sequence[Sequence[MlpCut]],
    clock: StageClock,
) -> Sequence[Sequence[MlpCut]]:
    with clock.stage("gaps", _tokens(subject, few), "tokens x layers") as advance:
        return gap_cuts(
            subject.adapter,
            few,
            cuts,
            damping=subject.options.refit_damping,
            round_to=subject.options.round_to,
            scratch=subject.scratch,
            advance=advance,
        )


def _fewer_heads(
    subject: Subject,
    few: Sequence[Batch],
    cuts: Sequence[Sequence[MlpCut]],
    heads: HeadLevels,
    clock: StageClock,
) -> Sequence[Sequence[Sequence[MlpCut]]]:
    total = len(heads.groups) * _tokens(subject, few)
    with clock.stage("heads", total, "tokens x layers") as advance:
        return cuts_with_fewer_heads(
            subject.adapter,
            few,
            cuts,
            heads,
            subject.options,
            scratch=subject.scratch,
            advance=advance,
        )


def _tokens(subject: Subject, batches: Sequence[Batch]) -> int:
    own = distributed.share(batches)
    return sum(batch.tokens for batch in own) * subject.adapter.num_layers


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
