"""Search the layers' widths by what each width costs: the rule `search` for ragged layouts.

1. *Library.* One pass over the calibration text gives every layer's cut to each width of a grid: removing all neurons
   once, in order of cost, gives all widths, and each gets its own refit.
2. *Costs.* The cost of a width is the divergence from the dense model when this layer alone is cut to it, on a few
   tokens set aside (:mod:`fbn_prune.model.divergence`). It is measured at two widths of each layer; the others follow
   from the errors of the layer's output. The cost of leaving a layer out counts what the layer below it makes up for
   (:mod:`fbn_prune.pruning.gaps`).
3. *Solver.* The widths with the least sum of costs within the budget (:mod:`fbn_prune.pruning.solver`).
4. *Correction.* Costs are not additive: what a layer adds depends on the damage below it. So the divergence of whole
   candidates is measured, with the library's cuts: even widths, the solver's, and the solver's with the costs of the
   lower, middle or upper layers scaled, as long as that helps.

A library of cuts with measured costs under one budget follows Puzzle (arXiv 2411.19146) and DarwinLM (arXiv
2502.07780); their entries are trained or scored by sampled loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch
from fbn_prune.errors import InvalidInput, counted
from fbn_prune.model.divergence import DenseReference
from fbn_prune.model.surgery import MlpCut
from fbn_prune.progress import StageClock
from fbn_prune.pruning.candidates import HEADS, LAYERS, Candidates, Sizes
from fbn_prune.pruning.costs import (
    HOPELESS,
    Costs,
    falling,
    finite,
    interpolated,
    levels_to_measure,
)
from fbn_prune.pruning.finished import FinishedLayer
from fbn_prune.pruning.layout import (
    RAGGED_GAIN,
    UNIFORM,
    HeadLevels,
    Layout,
    LayoutRequest,
    Subject,
    networks_layout,
)
from fbn_prune.pruning.library import Library, make_library

SEARCH, LOSS, NETWORKS = "search", "loss", "networks"

TRIED_TOKENS = 2048
"""Tokens on which the divergence of candidates is measured, and on half of them the costs of single layers; the same
ones for all models, so few are enough to compare them."""

PIECE = 128
"""Tokens of a piece of text on which the costs of single layers are measured."""

REGIONS = 3
"""The layers whose costs a correction scales together: the lower, middle and upper ones."""

SCALES = (2 / 3, 3 / 2)
"""Factors that a correction tries for the costs of a region."""

PLACES = 2
"""Widths of each layer at which the cost is measured."""

CURVE_SHARES = tuple(tenth / 20 for tenth in range(4, 20))
"""Shares of the size at which the curve of predicted divergence is known."""

HEADS_WORTH = 0.9
"""The divergence of a candidate with fewer attention heads counts as this part. Candidates are measured before the fit
in sequence, and that brings more back where heads went than where neurons did: on SmolLM2-135M, candidates with fewer
heads and with all of them were within 4 % of each other before it, and a fifth apart after it."""

MOST_DEPTHS = 8
"""Most models of fewer layers that are measured."""


@dataclass(frozen=True)
class Searched:
    """What a search of widths found.

    Attributes
    ----------
    layout
        The widths.
    """

    layout: Layout
    _library: Library

    @property
    def forward_seconds(self) -> float:
        """See :class:`fbn_prune.pruning.cutting.CutModel`."""
        return 0.0 if self._library.tried is None else self._library.tried.forward_seconds

    def finished(self) -> Iterator[FinishedLayer]:
        """Yield the layers, cut to these widths, in one-shot mode; nothing but neurons may be left out."""
        assert self._library.tried is not None
        return self._library.tried.finished(self._library.places(self.layout.widths))


def search_layout(subject: Subject, request: LayoutRequest, clock: StageClock) -> Searched:
    """Choose the widths of a request by the divergence that they cost.

    The trials of the result are divergences from the dense model in nats a token. The even widths are kept unless
    others are better; with the layout `auto`, by a tenth at least; those with fewer heads count less, see
    :data:`HEADS_WORTH`. `search` holds `measured`, the divergence of the chosen candidate; `summed`, the sum of the
    costs of its sizes; `predicted`, that sum times how far it was off for the most similar other candidate, which is
    what would be expected without measuring the chosen one; `share`, how much of the neurons (and of what layers have
    besides, in neurons) stays; `whole_parts` and `kept_parts`, how it spreads over each layer's neurons, attention and
    the rest, see :meth:`Candidates.parts`; and `curve`, pairs of such a share and the divergence that is expected
    there, through the one measured.

    Raises
    ------
    InvalidInput
        The calibration text is a single block.
    """
    shaping, trying = subject.blocks.split(max(2, subject.blocks.tokens // TRIED_TOKENS))
    if not shaping.blocks:
        raise InvalidInput(
            "a search of widths needs at least two blocks of calibration text: give more text, or use --layout uniform"
        )
    library = make_library(subject, shaping, request, clock)
    few = trying.subset(TRIED_TOKENS).batches(1)  # single blocks, which several processes can share
    with clock.stage("dense outputs"):
        reference = DenseReference(subject.adapter, few, subject.options.round_to)
        pieces = [_pieces(batch) for batch in few]
        of_layers = DenseReference(subject.adapter, pieces, subject.options.round_to)
    costs = _measured_costs(library, of_layers, request, _own_tokens(pieces), clock)
    candidates = Candidates(request, library.widths, costs)
    trial = _Trial(library, reference, request.heads, _own_tokens(few), clock)
    by_loss = None
    if subject.options.loss_aware and library.tried is not None and not request.rest:
        rises = [Costs(errors, HOPELESS) for errors in library.errors]
        by_loss = Candidates(request, library.widths, rises)
    if request.layout == UNIFORM:
        tried = _search_equal(trial, candidates)
    else:
        known: dict[str, Sizes] = {}
        if subject.networks is not None and (plain := candidates.even()) is not None:
            widths = networks_layout(replace(subject, blocks=shaping), request, clock)
            known[NETWORKS] = replace(plain, widths=widths)
        tried = _search_ragged(request, trial, candidates, known, by_loss)
    best = min(tried, key=lambda name: trial.worth(tried[name]))
    if (even := tried.get(UNIFORM)) is not None and best != UNIFORM:
        needed = 1 - RAGGED_GAIN if request.layout == "auto" else 1.0
        if trial.worth(tried[best]) > needed * even.divergence:
            best = UNIFORM
    off = _off(candidates, tried[best])
    chosen = tried[best].sizes
    layout = Layout(
        chosen.widths,
        UNIFORM if best == UNIFORM else SEARCH,
        {name: each.divergence for name, each in tried.items()},
        {
            "summed": candidates.summed(chosen),
            "measured": tried[best].divergence,
            "predicted": _predicted(candidates, tried, best),
            "share": candidates.share(chosen),
            "whole_parts": candidates.parts(),
            "kept_parts": candidates.parts(chosen),
            "curve": [(share, off * cost) for share, cost in candidates.curve(CURVE_SHARES)],
        },
        None if request.heads is None else [request.heads.groups[place] for place in chosen.heads],
    )
    return Searched(layout, library)


def _pieces(block: Batch) -> Batch:
    """Every second piece of a block: half of its tokens, but more first tokens.

    Of a few long blocks the divergence is noisy, because in many models a block's first token has massive activations
    that all others depend on.
    """
    starts = range(0, block.input_ids.shape[1] - PIECE + 1, 2 * PIECE)
    if len(starts) < 2:
        return block
    ids, valid = (
        torch.cat([part[:, start : start + PIECE] for start in starts])
        for part in (block.input_ids, block.valid)
    )
    some = valid.any(1)
    return Batch(ids[some], valid[some])


def _own_tokens(batches: Sequence[Batch]) -> int:
    """The number of this process's tokens."""
    return sum(batch.tokens for batch in distributed.share(batches))


def _measured_costs(
    library: Library,
    reference: DenseReference,
    request: LayoutRequest,
    tokens: int,
    clock: StageClock,
) -> list[Costs]:
    """The costs of each layer, measured at a few widths and interpolated between them."""
    share = max(request.budget, 0) / sum(request.full)
    places = [levels_to_measure(layer, share) for layer in library.widths]
    narrow: list[object] = []
    entries: dict[object, Sequence[MlpCut]] = {}
    for nth in range(PLACES if library.tried is not None else 0):
        chosen = [each[nth] for each in places]
        widths = (grid[place] for grid, place in zip(library.widths, chosen, strict=True))
        narrow.append(("widths", *widths))
        entries[narrow[-1]] = library.narrowed(chosen)
    heads = 0 if request.heads is None else len(request.heads.groups) - 1
    entries |= {("heads", level): library.with_heads(level) for level in range(heads)}
    known = library.measured
    entries = {key: cuts for key, cuts in entries.items() if key not in known}
    below = library.below_gaps[-1] if request.leaves_out and LAYERS not in known else None
    keys = [*entries, *([] if below is None else [LAYERS])]
    with clock.stage("costs of widths", len(keys) * len(places) * tokens, "tokens") as advance:
        if keys:
            each_layer = reference.alone([*entries.values()], advance, below_gaps=below)
            known |= zip(keys, map(list, zip(*each_layer, strict=True)), strict=True)
    errors = library.errors or [[0.0]] * len(library.widths)
    costs: list[Costs] = []
    for layer, error in enumerate(errors):
        without = finite(known[LAYERS][layer]) if request.leaves_out else HOPELESS
        measured = {
            place: known[key][layer] for place, key in zip(places[layer], narrow, strict=False)
        }
        of_heads = [known["heads", level][layer] for level in range(heads)]
        costs.append(
            Costs(
                interpolated(error, measured), without, falling([*of_heads, 0.0]) if heads else ()
            )
        )
    return costs


@dataclass(frozen=True)
class _Tried:
    """A candidate's sizes, and the divergence of the model cut so."""

    sizes: Sizes
    divergence: float


def _off(candidates: Candidates, one: _Tried) -> float:
    """How far the sum of costs is off: the measured divergence as a multiple of it."""
    summed = candidates.summed(one.sizes)
    return one.divergence / summed if summed > 0 else 1.0


def _predicted(candidates: Candidates, tried: Mapping[str, _Tried], name: str) -> float:
    """The divergence of a candidate, from its sum of costs and the most similar other candidate."""
    sizes = tried[name].sizes
    others = [each for key, each in tried.items() if key != name]
    nearest = min(others, key=lambda other: sizes.apart(other.sizes), default=tried[name])
    return _off(candidates, nearest) * candidates.summed(sizes)


class _Trial:
    """Measures candidates, with the library's cuts of the nearest widths."""

    def __init__(
        self,
        library: Library,
        reference: DenseReference,
        heads: HeadLevels | None,
        tokens: int,
        clock: StageClock,
    ) -> None:
        self._library, self._reference, self._heads = library, reference, heads
        self._tokens, self._clock = tokens, clock
        self.tried: dict[str, _Tried] = {}

    def worth(self, one: _Tried) -> float:
        """Return what a candidate's divergence counts as, see :data:`HEADS_WORTH`."""
        every = None if self._heads is None else len(self._heads.groups) - 1
        staying = [
            level for level, width in zip(one.sizes.heads, one.sizes.widths, strict=False) if width
        ]
        fewer = any(level != every for level in staying)
        return one.divergence * (HEADS_WORTH if fewer else 1.0)

    @contextmanager
    def measuring(self, most: int) -> Iterator[Callable[[str, Sizes], bool]]:
        """Yield a function that measures a named candidate, and returns whether it is the best so far."""
        self._clock.note(f"search of widths: at most {counted(most, 'layout')} are measured")
        with self._clock.stage("candidates", most * self._tokens, "tokens") as advance:

            def measure(name: str, sizes: Sizes) -> bool:
                if any(sizes == each.sizes for each in self.tried.values()):
                    return False
                cuts = self._library.chosen(sizes)
                found = finite(self._reference.divergence(cuts, advance, sizes.left_out))
                one = _Tried(sizes, found)
                best = all(self.worth(one) < self.worth(each) for each in self.tried.values())
                self.tried[name] = one
                return best

            yield measure


def _search_ragged(
    request: LayoutRequest,
    trial: _Trial,
    candidates: Candidates,
    known: Mapping[str, Sizes],
    by_loss: Candidates | None,
) -> dict[str, _Tried]:
    """Measure even widths and the solver's sizes, then the solver's with the costs of one region after another scaled.

    `known` has other sizes to start from. `by_loss` has the rise of the loss to second order as costs; its widths are
    measured too. Where more than neurons may go, so are the solver's sizes without each other structure, since the sum
    of costs may flatter one of them.
    """
    every = _structures(request)
    starts = {SEARCH: candidates.by_costs([1.0], every)}
    if (even := candidates.even()) is not None:
        starts = {UNIFORM: even, **known, **starts}
    tries = {SEARCH: every}
    for parts in _smaller(every):
        tries[name := f"{SEARCH}, {' and '.join(['neurons', *sorted(parts)])}"] = parts
        with suppress(InvalidInput):  # without that structure the model may be too large
            starts[name] = candidates.by_costs([1.0], parts)
    starts[f"{SEARCH} 0.5"] = candidates.halfway(starts[SEARCH])
    if by_loss is not None:
        best = by_loss.by_costs([1.0])
        starts |= {LOSS: best, f"{LOSS} 0.5": by_loss.halfway(best)}
    with trial.measuring(len(starts) + REGIONS * len(SCALES) + 1) as measure:
        for name, sizes in starts.items():
            measure(name, sizes)
        tried = (name for name in tries if name in trial.tried)  # not the same as others
        base = min(tried, key=lambda name: trial.worth(trial.tried[name]), default=SEARCH)
        parts, scales = tries[base], [1.0] * REGIONS
        for region in range(REGIONS):
            for factor in SCALES:
                scaled = [*scales]
                scaled[region] *= factor
                if measure(_name(base, scaled), candidates.by_costs(scaled, parts)):
                    scales = scaled
                    break
        if max(scales) != min(scales):
            halfway = candidates.halfway(candidates.by_costs(scales, parts))
            measure(f"{_name(base, scales)} 0.5", halfway)
    return trial.tried


def _structures(request: LayoutRequest) -> frozenset[str]:
    """What may go besides neurons."""
    asked = {LAYERS: request.leaves_out, HEADS: request.heads is not None}
    return frozenset(part for part, may_go in asked.items() if may_go)


def _smaller(parts: frozenset[str]) -> list[frozenset[str]]:
    """The sets of structures with one less, and the empty one."""
    found = [parts - {part} for part in sorted(parts)]
    return list(dict.fromkeys([*found, frozenset[str]()] if parts else []))


def _name(base: str, scales: Sequence[float]) -> str:
    return f"{base} {' '.join(format(scale, '.2g') for scale in scales)}"


def _search_equal(trial: _Trial, candidates: Candidates) -> dict[str, _Tried]:
    """Measure models of equal widths with fewer and fewer layers, from the number that the costs predict."""
    models = candidates.with_fewer_layers()
    predicted = min(range(len(models)), key=lambda index: models[index].cost)
    with trial.measuring(min(len(models), MOST_DEPTHS)) as measure:
        left = MOST_DEPTHS

        def known(index: int) -> float:
            nonlocal left
            model = models[index]
            if model.name not in trial.tried:
                measure(model.name, model.sizes)
                left -= 1
            return trial.tried[model.name].divergence

        at = predicted
        known(at)
        for step in (-1, 1):
            while left > 0 and 0 <= at + step < len(models) and known(at + step) < known(at):
                at += step
        if left > 0:
            known(0)
    return trial.tried
