"""Find a model's functional networks: sample activations, run spatial ICA, build the artifact.

With scope `global`, one ICA runs over the neurons of all layers together (arXiv 2502.20408); otherwise, one runs for
each layer (arXiv 2508.05239). Activations are sampled from whole blocks and streamed layer by layer. The solver
passes over them twice: they stay in memory between the passes if they fit, and are computed again otherwise.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fbn_prune.data.calibration import TokenBlocks
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.networks import ica
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.networks.recurrence import (
    STARTS,
    connectivity,
    driving_tokens,
    recurrence_between_starts,
)
from fbn_prune.networks.sampling import SampledActivations
from fbn_prune.progress import Advance, StageClock

CONTEXTS_PER_NETWORK = 5
TOKENS_PER_NETWORK = 8


@dataclass(frozen=True)
class DiscoveryOptions:
    """Settings of the search: the recipe keys of the same names.

    `recurrence` also decomposes both halves of the tokens and starts the ICA from other seeds, to measure stability.
    """

    networks: int
    network_tokens: int
    scope: str
    seed: int
    recurrence: bool = False


def discover(
    adapter: ModelAdapter,
    blocks: TokenBlocks,
    options: DiscoveryOptions,
    *,
    tokenizer: Any,
    batch_tokens: int,
    keep: bool,
    header: dict[str, Any],
    clock: StageClock,
    on_dense: Callable[[float], None] = lambda loss: None,
) -> FunctionalNetworks:
    """Find the functional networks of a model on calibration text.

    Parameters
    ----------
    tokenizer
        Decodes the tokens at which each network is strongest.
    keep
        Whether activations stay in memory between the solver's passes, see :class:`SampledActivations`.
    header
        Facts about the run to store with the networks (model, fingerprints, versions).
    on_dense
        Called before the decomposition with the model's mean loss on a part of the text, see
        :attr:`SampledActivations.loss`; may raise to end the search.

    Raises
    ------
    InvalidInput
        The tokens allow fewer networks than asked for, or a layer's activations contain NaN or Inf.
    """
    activations = SampledActivations(
        adapter,
        blocks,
        options.network_tokens,
        batch_tokens=batch_tokens,
        keep=keep,
        clock=clock,
    )
    if options.networks > activations.tokens - 1:
        raise InvalidInput(
            f"networks = {options.networks}: the calibration text gives {activations.tokens} tokens, "
            f"which allow {activations.tokens - 1} at most; lower --networks, or give more text"
        )
    for _ in activations:  # a stage of its own for the forward pass, separate from the solver's
        pass
    on_dense(activations.loss)
    with clock.stage("ica", (4 if options.recurrence else 1) * PARTS, "parts") as advance:
        found = _decompose(activations, slice(None), options, clock, advance)
        recurrence = _recurrence(activations, found, options, clock, advance)
    full_header = {
        **header,
        "scope": options.scope,
        "seed": options.seed,
        "tokens": activations.tokens,
        "convergence": found.facts,
        "contexts": _top_contexts(found.time_courses, activations, tokenizer),
        "driving_tokens": _top_tokens(found.time_courses, activations, tokenizer),
    }
    if recurrence is not None:
        full_header["recurrence"] = recurrence
    return FunctionalNetworks(
        maps=found.maps.cpu(),
        widths=activations.widths,
        mean=torch.cat(activations.mean),
        std=torch.cat(activations.std),
        explained_variance=found.explained_variance.cpu(),
        engagement=found.time_courses.double().square().mean(0).cpu(),
        connectivity=connectivity(found.time_courses),
        header=full_header,
    )


PARTS = 1000
"""Parts of the bar that one decomposition takes."""

GRAM_SHARE, USUAL_ITERATIONS = 0.6, 60


@dataclass(frozen=True)
class _Decomposition:
    maps: Tensor
    spans: list[slice]
    time_courses: Tensor
    explained_variance: Tensor
    facts: list[dict[str, Any]]


def _decompose(
    activations: SampledActivations,
    tokens: slice,
    options: DiscoveryOptions,
    clock: StageClock,
    advance: Advance,
) -> _Decomposition:
    """Networks of the sampled tokens in the slice `tokens`, global or layer by layer."""
    neurons, layers = sum(activations.widths), len(activations.widths)
    solves = 1 if options.scope == "global" else layers
    course = _Course(advance, solves, layers // solves)
    if options.scope == "global":
        return _join(
            [_solve(lambda: (z[tokens] for z in activations), options, clock, course)],
            [(0, neurons)],
            neurons,
        )
    results = []
    for z in activations:
        part = z[tokens]
        results.append(_solve(lambda part=part: iter([part]), options, clock, course))  # type: ignore[misc]
    ends = list(itertools.accumulate(activations.widths))
    return _join(results, list(itertools.pairwise([0, *ends])), neurons)


class _Course:
    """Turns the work of a decomposition into parts of the stage's bar, :data:`PARTS` in all.

    The Gram matrices take a known share. The solvers' iterations, whose number nobody knows, take the rest in ever
    smaller steps, so that the bar moves with each and never runs past its end.
    """

    def __init__(self, advance: Advance, solves: int, layers: int) -> None:
        self._advance, self._solves, self._layers = advance, solves, layers
        self._solved, self._work, self._shown = 0, 0.0, 0

    def step(self, units: float) -> None:
        self._work += units
        iterations = max(0.0, self._work - self._layers) / ica.ITERATION
        grams = GRAM_SHARE if self._layers else 0.0
        share = (1 - grams) * (1 - math.exp(-iterations / USUAL_ITERATIONS))
        share += grams * min(1.0, self._work / max(self._layers, 1))
        self._show((self._solved + share) / self._solves)

    def solved(self) -> None:
        self._solved, self._work = self._solved + 1, 0.0
        self._show(self._solved / self._solves)

    def _show(self, share: float) -> None:
        parts = int(PARTS * share)
        if parts > self._shown:
            self._advance(parts - self._shown)
            self._shown = parts


def _solve(
    layers: ica.Layers, options: DiscoveryOptions, clock: StageClock, course: _Course
) -> ica.IcaResult:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ica.IcaConvergenceWarning)
        result = ica.spatial_ica(layers, options.networks, seed=options.seed, on_step=course.step)
    course.solved()
    for warning in caught:
        clock.note(f"warning: {warning.message}")
    return result


def _join(
    results: list[ica.IcaResult], spans: list[tuple[int, int]], neurons: int
) -> _Decomposition:
    """Place the maps side by side over all layers; a layer-wise map is zero outside its layer."""
    maps, facts = [], []
    for result, (start, stop) in zip(results, spans, strict=True):
        full = torch.zeros(len(result.maps), neurons)
        full[:, start:stop] = result.maps.cpu()
        maps.append(full)
        facts.append(
            {
                "converged": result.converged,
                "eigen_iterations": result.eigen_iterations,
                "eigen_residual": result.eigen_residual,
                "ica_iterations": result.ica_iterations,
                "ica_change": result.ica_change,
            }
        )
    return _Decomposition(
        torch.cat(maps),
        [slice(start, stop) for start, stop in spans],
        torch.cat([result.time_courses.cpu() for result in results], dim=1),
        torch.cat([result.explained_variance.cpu() for result in results]),
        facts,
    )


def _recurrence(
    activations: SampledActivations,
    found: _Decomposition,
    options: DiscoveryOptions,
    clock: StageClock,
    advance: Advance,
) -> dict[str, Any] | None:
    """How well each network is found again, by overlap (IoU) of members and by correlation of maps.

    Between halves: its match in the first half of the tokens against its match in the second; the halves share no
    block. Between seeds: the network against its matches from other starts.
    """
    if not options.recurrence or options.networks > activations.tokens // 2 - 1:
        return None
    middle = activations.tokens // 2
    halves = [
        _decompose(activations, tokens, options, clock, advance)
        for tokens in (slice(0, middle), slice(middle, None))
    ]
    counterpart, _ = ica.match(found.maps, halves[0].maps)
    overlap = ica.spatial_overlap(halves[0].maps[counterpart], halves[1].maps)
    course = _Course(advance, len(found.spans) * STARTS, 0)
    seeds = range(options.seed + 1, options.seed + 1 + STARTS)
    with warnings.catch_warnings():
        # This measures how often starts agree; one that does not settle is a result, not a failure.
        warnings.simplefilter("ignore", ica.IcaConvergenceWarning)
        starts = recurrence_between_starts(
            found.maps,
            found.spans,
            seeds,
            lambda solved: course.solved() if solved else course.step(ica.ITERATION),
        )
    return {"iou_halves": overlap.tolist(), "starts": STARTS, **starts}


def _top_contexts(
    time_courses: Tensor, activations: SampledActivations, tokenizer: Any
) -> list[list[dict[str, Any]]]:
    """For each network, the tokens at which its time course is strongest, with the text around them."""
    contexts: list[list[dict[str, Any]]] = []
    count = min(CONTEXTS_PER_NETWORK, activations.tokens)
    for course in time_courses.T:
        cards = []
        for sample in torch.topk(course.abs(), count).indices.tolist():
            ids, place = activations.contexts(sample)
            cards.append(
                {
                    "before": tokenizer.decode(ids[:place]),
                    "token": tokenizer.decode(ids[place : place + 1]),
                    "after": tokenizer.decode(ids[place + 1 :]),
                    "activity": float(course[sample]),
                }
            )
        contexts.append(cards)
    return contexts


def _top_tokens(
    time_courses: Tensor, activations: SampledActivations, tokenizer: Any
) -> list[list[dict[str, Any]]]:
    """For each network, the tokens that drive it in all contexts, as text."""
    driving = driving_tokens(time_courses, activations.token_ids(), TOKENS_PER_NETWORK)
    return [
        [{**entry, "token": tokenizer.decode([entry["token"]])} for entry in entries]
        for entries in driving
    ]
