"""Which widths the layers get: one for all, or each its own, by one of several rules, or by a trial of them.

A trial cuts the model in each way at the same number of neurons and takes the loss on calibration blocks left out of
the statistics that the cuts are fitted on. The held-out text stays out of it: it only measures what was chosen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fbn_prune.calibration import TokenBlocks
from fbn_prune.errors import InvalidInput
from fbn_prune.model.families import Family
from fbn_prune.model.streaming import SpilledCuts, down_weights, stream_of
from fbn_prune.model.surgery import MlpCut, as_if_cut
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.perplexity import mean_loss
from fbn_prune.progress import StageClock
from fbn_prune.pruning.allocation import (
    at_most,
    member_scores,
    narrowed,
    network_scores,
    ranked_widths,
    uniform_widths,
)
from fbn_prune.pruning.criteria import CRITERIA, neuron_costs
from fbn_prune.pruning.pipeline import CutOptions, EvidencePass

UNIFORM = "uniform"
TRIED_EVERY = 8
"""In a trial, each so-many-th calibration block is set aside to measure on."""

RAGGED_GAIN = 0.1
"""The share of the loss rise that ragged layers must save to be worth a checkpoint that brings its own code."""


@dataclass(frozen=True)
class LayoutRequest:
    """What is asked of the widths.

    Attributes
    ----------
    layout, rule
        The recipe's `layout` and `widths`.
    budget
        Neurons to keep.
    most
        Whether the budget may be undercut and not exceeded.
    full
        Neurons of each layer now.
    multiple
        See :func:`fbn_prune.pruning.allocation.ranked_widths`.
    whole
        Layers that keep everything.
    """

    layout: str
    rule: str
    budget: int
    most: bool
    full: tuple[int, ...]
    multiple: int
    whole: Collection[int] = ()


@dataclass(frozen=True)
class Layout:
    """The widths, the rule that gave them, and the loss rise over dense of each rule tried (nats a token)."""

    widths: list[int]
    rule: str
    trials: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """The dense model and what is known of it when its widths are chosen."""

    model: PreTrainedModel
    family: Family
    blocks: TokenBlocks
    batch_tokens: int
    options: CutOptions
    networks: FunctionalNetworks | None
    kept: Sequence[int]
    loss_roots: Sequence[Tensor] | None


def choose_layout(subject: Subject, request: LayoutRequest, clock: StageClock) -> Layout:
    """The widths that the request asks for, tried against each other where it leaves them open."""
    rules = _rules(request)
    if rules == [UNIFORM]:
        return Layout(_uniform(request), UNIFORM)
    shaping, trying = subject.blocks, subject.blocks
    if len(rules) > 1:
        shaping, trying = subject.blocks.split(TRIED_EVERY)
        if not shaping.blocks:
            raise InvalidInput(
                "one calibration block cannot shape a trial of widths and measure it too: give more text"
            )
    subject = replace(subject, blocks=shaping)
    candidates = {rule: _widths(subject, request, rule, clock) for rule in rules}
    if len(rules) == 1:
        return Layout(candidates[rules[0]], rules[0])
    trials = _trials(subject, candidates, trying, clock)
    best = min(rules, key=trials.__getitem__)
    if request.layout == "auto":
        ragged = min((rule for rule in rules if rule != UNIFORM), key=trials.__getitem__)
        worth_it = trials[ragged] <= (1 - RAGGED_GAIN) * trials[UNIFORM]
        best = ragged if worth_it else UNIFORM
    return Layout(candidates[best], best, trials)


def _rules(request: LayoutRequest) -> list[str]:
    """The rules to try. An even split is always among several: on small models it can be the best of them."""
    if request.layout == UNIFORM:
        return [UNIFORM]
    if request.rule == "auto":
        return [UNIFORM, "networks", "loss"]
    return [UNIFORM, request.rule] if request.layout == "auto" else [request.rule]


def _uniform(request: LayoutRequest) -> list[int]:
    budget = request.budget
    if request.most:
        budget = at_most(budget, len(request.full), request.multiple)
    return uniform_widths(budget, request.full, request.multiple)


def _widths(subject: Subject, request: LayoutRequest, rule: str, clock: StageClock) -> list[int]:
    if rule == UNIFORM and request.layout == "auto":
        return _uniform(request)
    budget = request.budget
    if request.layout == "auto":
        budget = sum(_uniform(request))  # a trial compares equals
    if rule == UNIFORM:
        scores = [torch.arange(width, 0, -1) for width in request.full]
    else:
        scores = _scores(subject, rule, clock)
    widths = ranked_widths(scores, budget, request.multiple, request.whole)
    return narrowed(widths, budget, request.multiple, request.whole) if request.most else widths


def _scores(subject: Subject, rule: str, clock: StageClock) -> list[Tensor]:
    if rule == "loss":
        return [neuron_costs(layer) for layer in _evidence(subject, subject.loss_roots, clock)]
    assert subject.networks is not None
    if rule == "members":
        return member_scores(subject.networks, subject.kept)
    weights: Iterable[Tensor] = down_weights(subject.model, subject.family)
    if subject.options.loss_aware and (roots := subject.loss_roots) is not None:
        weights = (root @ weight.double() for root, weight in zip(roots, weights, strict=True))
    return network_scores(subject.networks, weights)


def _evidence(
    subject: Subject, loss_roots: Sequence[Tensor] | None, clock: StageClock
) -> EvidencePass:
    """One-shot also where the cut will be sequential: widths are chosen before any layer is cut."""
    membership = None
    if subject.networks is not None:
        membership = member_scores(subject.networks, subject.kept)
    return EvidencePass(
        subject.model,
        subject.family,
        subject.blocks.batches(subject.batch_tokens),
        replace(subject.options, sequential=False),
        membership=membership,
        loss_roots=loss_roots,
        clock=clock,
        stage="widths",
    )


def _trials(
    subject: Subject, candidates: dict[str, list[int]], trying: TokenBlocks, clock: StageClock
) -> dict[str, float]:
    """Loss rise over dense, for each candidate."""
    stream = stream_of(subject.model)
    cuts: dict[str, list[MlpCut] | SpilledCuts] = {
        rule: [] if stream is None else SpilledCuts(stream.scratch) for rule in candidates
    }
    loss_roots = subject.loss_roots if subject.options.loss_aware else None
    for layer in _evidence(subject, loss_roots, clock):
        made: dict[int, MlpCut] = {}
        for rule, widths in candidates.items():
            width = widths[layer.layer]
            if width not in made:
                made[width] = CRITERIA[subject.options.criterion](layer, width)
            cuts[rule].append(made[width])
    batches = trying.batches(subject.batch_tokens)
    rises: dict[str, float] = {}
    with clock.stage("trial", len(cuts) + 1, "layouts") as advance:
        dense = mean_loss(subject.model, batches)
        advance(1)
        for rule, parts in cuts.items():
            with (
                as_if_cut(subject.model, subject.family, parts)
                if stream is None
                else stream.tried(parts)
            ):
                rises[rule] = mean_loss(subject.model, batches) - dense
            advance(1)
    return rises
