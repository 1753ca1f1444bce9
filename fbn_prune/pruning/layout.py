"""Choose the layers' widths: equal ones, those of a rule, or the best of several candidates in a trial.

A trial cuts the model to each candidate's widths, all with the same total, and compares the losses on calibration
blocks that were set aside when the cuts were fitted. The held-out text plays no part in the choice; it only measures
the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fbn_prune.data.calibration import TokenBlocks
from fbn_prune.errors import InvalidInput, counted
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.perplexity import token_losses
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.progress import StageClock
from fbn_prune.pruning.allocation import (
    at_most,
    blended_widths,
    even_scores,
    member_scores,
    narrowed,
    network_scores,
    ranked_widths,
    uniform_widths,
)
from fbn_prune.pruning.criteria import neuron_costs
from fbn_prune.pruning.cutting import CutPlan, try_cuts
from fbn_prune.pruning.evidence import CutOptions, EvidencePass
from fbn_prune.pruning.fitting import DampingNotes

UNIFORM = "uniform"
MOST_TRIED_EVERY = 8
TRIAL_TOKENS = 8192
"""A trial sets about this many tokens of calibration text aside for measurement, but at least an eighth of all."""

STRENGTHS = (0.5, 0.75, 1.0)
"""How far each rule's candidates go from the even split (0) to the rule's own widths (1): the full step can be too
large where the rule is right, and on some models the rule is wrong."""

SURE_ERRORS = 2.0
"""A rule replaces the even split only if its loss on the trial tokens is lower by this many standard errors."""

RAGGED_GAIN = 0.1
"""With layout `auto`, ragged layers must save this share of the loss rise to justify a checkpoint with its own model
code."""


@dataclass(frozen=True)
class LayoutRequest:
    """The requested layout and budget.

    Attributes
    ----------
    layout, rule
        The recipe's `layout` and `widths`.
    budget
        Neurons to keep.
    most
        Whether the budget is an upper limit, which rounding may not exceed.
    full
        Present number of neurons of each layer.
    multiple, whole
        See :func:`fbn_prune.pruning.allocation.ranked_widths`.
    rest
        For each layer, the parameters outside its MLP, as the number of neurons that have as many. Empty if nothing but
        neurons may go.
    narrows
        Whether layers may lose neurons, and not only go as a whole.
    leaves_out
        Whether whole layers may go.
    heads
        The numbers of attention heads that a layer may keep; None if it keeps all.
    """

    layout: str
    rule: str
    budget: int
    most: bool
    full: tuple[int, ...]
    multiple: int
    whole: Collection[int] = ()
    rest: tuple[int, ...] = ()
    narrows: bool = True
    leaves_out: bool = False
    heads: HeadLevels | None = None


@dataclass(frozen=True)
class HeadLevels:
    """The numbers of groups of attention heads that a layer may keep, see :class:`fbn_prune.model.heads.HeadShape`.

    Attributes
    ----------
    groups
        The numbers, ascending; the last is that of all groups, and 0 leaves out the attention.
    saved
        For each of them, the number of neurons that have as many parameters as the attention loses, rounded down.
    whole
        The number of neurons that have as many parameters as a whole attention, rounded down.
    """

    groups: tuple[int, ...]
    saved: tuple[int, ...]
    whole: int

    @property
    def all_groups(self) -> int:
        """The number of groups of a whole layer."""
        return self.groups[-1]

    def first_layer(self, level: int) -> bool:
        """Return whether the first layer can have this level: llama.cpp needs an attention there."""
        return self.groups[level] > 0

    def most_saved(self, layer: int) -> int:
        """Return the most that a layer can save."""
        return next(
            saved for level, saved in enumerate(self.saved) if layer > 0 or self.first_layer(level)
        )


@dataclass(frozen=True)
class Layout:
    """The chosen widths, the rule that gave them, and each tried candidate's loss rise over dense, in nats a token.

    A layer of width 0 is left out of the model. A rule's name with a number, as in "networks 0.5", is that part of the
    way from the even split to the rule's own widths. `search` is what a search of
    widths found. `head_groups` has the number of groups of attention heads that each layer keeps, if it was searched.
    """

    widths: list[int]
    rule: str
    trials: dict[str, float] = field(default_factory=dict)
    search: dict[str, Any] | None = None
    head_groups: list[int] | None = None

    @property
    def left_out(self) -> frozenset[int]:
        """The layers that are left out of the model."""
        return frozenset(layer for layer, width in enumerate(self.widths) if width == 0)


@dataclass(frozen=True)
class Subject:
    """The dense model, the data on which widths are chosen, and a folder for trial cuts."""

    adapter: ModelAdapter
    blocks: TokenBlocks
    batch_tokens: int
    criterion: str
    options: CutOptions
    networks: FunctionalNetworks | None
    kept: Sequence[int]
    loss_roots: Sequence[Tensor] | None
    scratch: Path


def trial_bytes(request: LayoutRequest, hidden: int, itemsize: int) -> int:
    """Return the bytes on disk that a trial's cuts take, with `hidden` output weights per neuron; 0 without a trial."""
    rules = _rules(request)
    if not rules or (request.layout == "ragged" and rules == ["members"]):
        return 0
    candidates = 1 + sum(len(_strengths(rule)) for rule in rules)
    return candidates * request.budget * hidden * itemsize


def choose_layout(subject: Subject, request: LayoutRequest, clock: StageClock) -> Layout:
    """Choose the widths for a request.

    Raises
    ------
    InvalidInput
        A trial is needed, but the calibration text is a single block.
    """
    rules = _rules(request)
    if not rules:
        return Layout(_uniform(request), UNIFORM)
    if request.layout == "ragged" and rules == ["members"]:  # the published rule has no trial
        return Layout(_ranked(subject, request, "members", clock), "members")
    shaping, trying = subject.blocks.split(tried_every(subject.blocks.tokens))
    if not shaping.blocks:
        raise InvalidInput(
            "a trial of widths needs at least two blocks of calibration text: give more text, or use --layout uniform"
        )
    subject = replace(subject, blocks=shaping)
    candidates = _candidates(subject, request, rules, clock)
    dense, losses = _trials(subject, candidates, trying, clock)
    trials = {name: float((found - dense).mean()) for name, found in losses.items()}
    better = [name for name in losses if surely_less(losses[name], losses[UNIFORM])]
    best = min(better, key=trials.__getitem__, default=UNIFORM)
    if request.layout == "auto" and trials[best] > (1 - RAGGED_GAIN) * trials[UNIFORM]:
        best = UNIFORM
    return Layout(candidates[best], best, trials)


def _rules(request: LayoutRequest) -> list[str]:
    """The rules to try in comparison with the even split."""
    if request.layout == UNIFORM:
        return []
    return ["networks", "loss"] if request.rule == "auto" else [request.rule]


def _strengths(rule: str) -> tuple[float, ...]:
    return (1.0,) if rule == "members" else STRENGTHS


def tried_every(tokens: int) -> int:
    """Set every n-th block aside for the trial; n is smaller for short texts, but at least 2."""
    return max(2, min(MOST_TRIED_EVERY, tokens // TRIAL_TOKENS))


def _candidates(
    subject: Subject, request: LayoutRequest, rules: Sequence[str], clock: StageClock
) -> dict[str, list[int]]:
    """Candidate widths by name; all keep the same number of neurons."""
    even = even_layout(request)
    candidates = {UNIFORM: even}
    for rule in rules:
        ranked = _ranked(subject, request, rule, clock)
        for strength in _strengths(rule):
            widths = blended_widths(
                even, ranked, strength, request.full, request.multiple, request.whole
            )
            name = rule if strength == 1 else f"{rule} {strength:g}"
            candidates[name] = _within(request, widths)
    return candidates


def surely_less(losses: Tensor, others: Tensor) -> bool:
    """Whether the mean loss is lower by more than the sampling error."""
    difference = losses - others
    doubt = SURE_ERRORS * float(difference.std()) / math.sqrt(len(difference))
    return float(difference.mean()) < -doubt


def _uniform(request: LayoutRequest) -> list[int]:
    budget = request.budget
    if request.most:
        budget = at_most(budget, len(request.full), request.multiple)
    return uniform_widths(budget, request.full, request.multiple)


def even_layout(request: LayoutRequest) -> list[int]:
    """Return the even widths: one width for all layers, or the same share of each where layers may differ."""
    if request.layout == "auto":
        return _uniform(request)
    scores = even_scores(request.full)
    widths = ranked_widths(scores, request.budget, request.multiple, request.whole)
    return _within(request, widths)


def networks_layout(subject: Subject, request: LayoutRequest, clock: StageClock) -> list[int]:
    """Return the widths by the networks' shares of each layer, as many neurons as the even ones."""
    return _ranked(subject, request, "networks", clock)


def _ranked(subject: Subject, request: LayoutRequest, rule: str, clock: StageClock) -> list[int]:
    budget = request.budget
    if request.layout == "auto":
        budget = sum(_uniform(request))  # a trial compares models of equal size
    scores = _scores(subject, rule, clock)
    return _within(request, ranked_widths(scores, budget, request.multiple, request.whole))


def _within(request: LayoutRequest, widths: list[int]) -> list[int]:
    if not request.most:
        return widths
    return narrowed(widths, request.budget, request.multiple, request.whole)


def _scores(subject: Subject, rule: str, clock: StageClock) -> list[Tensor]:
    if rule == "loss":
        costs = []
        for layer in _evidence(subject, subject.loss_roots, clock):
            with DampingNotes().heard(layer.layer):
                costs.append(neuron_costs(layer))
        return costs
    assert subject.networks is not None
    if rule == "members":
        return member_scores(subject.networks, subject.kept)
    weights: Iterable[Tensor] = subject.adapter.down_weights()
    if subject.options.loss_aware and (roots := subject.loss_roots) is not None:
        weights = (r.to(w.device) @ w.double() for r, w in zip(roots, weights, strict=True))
    return network_scores(subject.networks, weights)


def _evidence(
    subject: Subject, loss_roots: Sequence[Tensor] | None, clock: StageClock
) -> EvidencePass:
    """Evidence in one-shot mode also for sequential cuts, because widths are chosen before any layer is cut."""
    return EvidencePass(
        subject.adapter,
        subject.blocks.batches(subject.batch_tokens),
        replace(subject.options, sequential=False, head_groups=None),
        loss_roots=loss_roots,
        clock=clock,
        stage="widths",
    )


def _trials(
    subject: Subject, candidates: dict[str, list[int]], trying: TokenBlocks, clock: StageClock
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses [tokens] of the dense model and of each candidate."""
    members = None
    if subject.networks is not None:
        members = member_scores(subject.networks, subject.kept)
    clock.note(f"trial of {counted(len(candidates), 'layout')}: {', '.join(candidates)}")
    cuts = try_cuts(  # the final cut reports the same changes of damping
        subject.adapter,
        subject.blocks.batches(subject.batch_tokens),
        {name: CutPlan(subject.criterion, widths, members) for name, widths in candidates.items()},
        subject.options,
        loss_roots=subject.loss_roots if subject.options.loss_aware else None,
        scratch=subject.scratch,
        clock=clock,
        stage="widths",
    ).cuts
    batches = trying.batches(subject.batch_tokens)
    tokens = sum(batch.tokens for batch in batches)
    losses: dict[str, Tensor] = {}
    with clock.stage("trial", (len(cuts) + 1) * tokens, "tokens") as advance:
        dense = token_losses(subject.adapter, batches, advance)
        for tried, (name, parts) in enumerate(cuts.items(), 1):
            start = time.perf_counter()
            with subject.adapter.trying(parts):
                losses[name] = token_losses(subject.adapter, batches, advance)
            if tried == 1:
                took = time.perf_counter() - start
                clock.note_time("trial", f"{name} widths", took, len(cuts) - tried)
    return dense, losses
