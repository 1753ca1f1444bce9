"""Remove a skill that a few examples show, as far as the other text can spare it.

The output weights are fitted to do little on the examples, or the neurons that the examples need are cut.
The examples may resemble a part of the calibration text. That part is left out of everything: a refit on it would teach
the remaining neurons the skill again, and a measurement on it would count the skill's loss as damage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fbn_prune.data.calibration import TokenBlocks
from fbn_prune.data.examples import example_blocks
from fbn_prune.errors import InvalidInput, counted
from fbn_prune.model.perplexity import mean_loss
from fbn_prune.networks.activity import time_courses
from fbn_prune.networks.forgetting import (
    STRENGTHS,
    activity_ratio,
    alike,
    between,
    candidate_sizes,
    key_neurons,
    largest_within,
    marked,
    selectivity,
    strengths_between,
)
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.pruning.cutting import CutPlan, try_cuts
from fbn_prune.pruning.layout import Subject
from fbn_prune.runs.kept import numbers, tensors
from fbn_prune.runs.opening import OpenRun
from fbn_prune.store import Store

CRITERION = "membership-refit"
TRIED_EVERY = 4
"""One in so many blocks of the other text is set aside to measure what a cut costs."""


@dataclass(frozen=True)
class Forgetting:
    """What to forget, and what must stay.

    Attributes
    ----------
    examples, measured
        Blocks of the skill: those that choose neurons, and those that the loss is measured on (the same if there are
        fewer than three).
    rest, held_out
        The calibration and held-out blocks that are not like the examples.
    left_out
        Number of calibration blocks that are.
    scores
        How much each neuron belongs to the skill, float64 [N].
    selective
        How much more the skill engages each network than the rest does, [networks].
    """

    examples: TokenBlocks
    measured: TokenBlocks
    rest: TokenBlocks
    held_out: TokenBlocks
    left_out: int
    scores: Tensor
    selective: Tensor


def plan_forgetting(on: OpenRun, networks: FunctionalNetworks, store: Store) -> Forgetting:
    """Find the calibration text that is not like the examples, and the neurons that only the examples need.

    Raises
    ------
    InvalidInput
        The examples give no block, or almost all calibration text is like them.
    """
    prepared, recipe = on.prepared, on.prepared.recipe
    assert prepared.forget is not None
    every = example_blocks(
        prepared.forget,
        on.tokenizer,
        context=prepared.context,
        vocabulary=prepared.family.vocab_size(prepared.checkpoint.config),
        source=str(recipe.forget),
    )
    examples, measured = every.split(3) if len(every.blocks) >= 3 else (every, every)
    parts = (on.data.calibrating, on.data.held_out, examples)

    def compute() -> dict[str, Tensor]:
        seen = [_activity(on, networks, part) for part in parts]
        like = alike(torch.cat([seen[0].means, seen[1].means]), seen[2].means)
        keep = ~like[: len(parts[0].blocks)]
        if not bool(keep.any()):
            keep = torch.ones_like(keep)  # refused below
        skill, rest = seen[2].averages(), seen[0].averages(keep)
        selective = selectivity(skill.engagement, rest.engagement)
        if recipe.forget_by == "networks":
            scores = key_neurons(networks.maps, selective)
        else:
            scores = activity_ratio(skill.neurons, rest.neurons)
        return {"like": like, "selective": selective, "scores": scores}

    found = tensors(store, "forget", compute)
    count = len(parts[0].blocks)
    kept = [
        part.chosen([i for i, gone in enumerate(like.tolist()) if not gone])
        for part, like in zip(parts, (found["like"][:count], found["like"][count:]), strict=False)
    ]
    left_out = count - len(kept[0].blocks)
    if len(kept[0].blocks) < 2 * TRIED_EVERY or not kept[1].blocks:
        raise InvalidInput(
            f"forget = {recipe.forget}: {left_out} of {counted(count, 'calibration block')} are like the examples, and "
            "what is left is too little to keep the rest by: give other calibration text"
        )
    on.clock.note(
        f"forget: {left_out} of {counted(count, 'calibration block')} are like the examples and left out"
    )
    return Forgetting(
        examples, measured, kept[0], kept[1], left_out, found["scores"], found["selective"]
    )


def choose_cut(
    on: OpenRun, subject: Subject, what: Forgetting, store: Store
) -> tuple[CutPlan, dict[str, Any]]:
    """Find how far the skill can be removed before the loss on the rest rises by more than `forget_cost`.

    The dial is the strength with which the skill is erased, or the number of neurons that are cut.

    Returns
    -------
    plan
        What to do with the whole text; `membership` is what each neuron is worth to the rest (below 0: it goes).
    facts
        The course of the search, as JSON values.

    Raises
    ------
    InvalidInput
        Even the first step costs more.
    """
    recipe, erasing = on.prepared.recipe, on.prepared.recipe.forget_by == "erasing"
    fitted, tried = what.rest.split(TRIED_EVERY)
    measuring = tried.batches(subject.batch_tokens)

    def costs(dials: Sequence[float]) -> list[list[float]]:
        cuts = try_cuts(
            on.adapter,
            fitted.batches(subject.batch_tokens),
            {dial: _plan(on, what, dial) for dial in dials},
            subject.options,
            skill=what.examples.batches(subject.batch_tokens) if erasing else (),
            scratch=subject.scratch,
            clock=on.clock,
            stage="forget",
        ).cuts
        dense = mean_loss(on.adapter, measuring)
        found = []
        for dial, parts in cuts.items():
            with on.adapter.trying(parts):
                found.append([dial, mean_loss(on.adapter, measuring) - dense])
        return found

    def search() -> list[list[float]]:
        found = costs(STRENGTHS if erasing else candidate_sizes(len(what.scores)))
        low = largest_within([(d, c) for d, c in found], recipe.forget_cost)
        above = [dial for dial, _ in found if dial > low]
        if low and above:
            closer = strengths_between if erasing else between
            if steps := closer(low, min(above)):
                found += costs(steps)
        return sorted(found)

    trials: list[list[float]] = numbers(store, "forget-trials", search)
    dial = largest_within([(d, c) for d, c in trials], recipe.forget_cost)
    if dial == 0:
        least = min(trials)
        step = f"erasing with strength {least[0]:g}" if erasing else f"cutting {least[0]:g} neurons"
        raise InvalidInput(
            f"forget_cost = {recipe.forget_cost}: {step} already costs the other text {least[1]:.3f} nats a token: "
            "allow more, or give more calibration text"
        )
    facts = {
        "file": str(recipe.forget),
        "examples": len(on.prepared.forget or ()),
        "blocks_left_out": what.left_out,
        "by": recipe.forget_by,
        "neurons": 0 if erasing else int(dial),
        "strength": dial if erasing else None,
        "how": f"erased with strength {dial:.3g}" if erasing else f"{dial:g} neurons are cut or silent",
        "cost_limit": recipe.forget_cost,
        "trials": trials,
    }  # fmt: skip
    return _plan(on, what, dial), facts


def _plan(on: OpenRun, what: Forgetting, dial: float) -> CutPlan:
    """The plan that erases with this strength, or cuts so many of the neurons that belong most to the skill."""
    full = on.prepared.widths
    if on.prepared.recipe.forget_by == "erasing":
        return CutPlan("erasing", full, erase=dial)
    worth = list(torch.split(marked(what.scores, int(dial)), full))
    left = [max(1, int((part >= 0).sum())) for part in worth]
    if on.prepared.recipe.layout == "uniform":
        multiple = on.prepared.width_multiple
        left = [min(full[0], -(-max(left) // multiple) * multiple)] * len(full)
    return CutPlan(CRITERION, left, worth)


@dataclass(frozen=True)
class _Averages:
    engagement: Tensor
    neurons: Tensor


@dataclass(frozen=True)
class _Activity:
    """Of each block the number of tokens, and over its tokens the mean of the time courses, of their squares, and of
    the abs activations: [blocks], [blocks, networks] twice, and [blocks, N]."""

    tokens: Tensor
    means: Tensor
    squares: Tensor
    neurons: Tensor

    def averages(self, chosen: Tensor | None = None) -> _Averages:
        """Average over the tokens of the chosen blocks, bool [blocks]."""
        weights = self.tokens if chosen is None else self.tokens * chosen
        weights = weights / weights.sum()
        return _Averages(weights @ self.squares, (weights.float() @ self.neurons).double())


def _activity(on: OpenRun, networks: FunctionalNetworks, blocks: TokenBlocks) -> _Activity:
    """Return the activity of networks and neurons in each block, in the order of the blocks."""
    batches = blocks.batches(on.prepared.batch_tokens)
    lengths = [batch.valid.sum(1).tolist() for batch in batches]
    by_layer: list[list[Tensor]] = [[] for _ in networks.widths]
    std, mean = networks.by_layer(networks.std), networks.by_layer(networks.mean)

    def watch(layer: int, index: int, z: Tensor) -> None:
        x = z.cpu() * std[layer] + mean[layer]
        by_layer[layer] += [part.abs().mean(0) for part in torch.split(x, lengths[index])]

    courses = torch.cat(time_courses(on.adapter, networks, batches, on.clock, watch))
    every = [length for batch in lengths for length in batch]
    parts = torch.split(courses, every)
    places = torch.argsort(torch.tensor(blocks.batch_order()))
    return _Activity(
        torch.tensor(every, dtype=torch.float64)[places],
        torch.stack([part.mean(0) for part in parts])[places],
        torch.stack([part.square().mean(0) for part in parts])[places],
        torch.cat([torch.stack(layer) for layer in by_layer], dim=1)[places],
    )


def without_like(on: OpenRun, what: Forgetting) -> OpenRun:
    """Return the run with the calibration and held-out text that is not like the examples."""
    data = replace(on.data, calibrating=what.rest, held_out=what.held_out)
    return replace(on, data=data)
