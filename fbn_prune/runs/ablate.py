"""Mask, retain or amplify networks of a checkpoint and measure the effect (the `ablate` command; arXiv 2502.20408).

Measures each network alone, growing sets of the strongest networks, and two controls with as many neurons: random sets,
drawn many times, and principal components of the same space, ranked by the same rule.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fbn_prune.data import builtin
from fbn_prune.data.calibration import Batch, first_blocks
from fbn_prune.errors import InvalidInput, counted
from fbn_prune.networks.activity import principal_networks, second_moment, time_courses
from fbn_prune.networks.functional_networks import HUB_Z
from fbn_prune.networks.intervention_effects import (
    Ablated,
    Ablation,
    ActionName,
    Band,
    Quality,
    Step,
    TaskMeasure,
    check_sizes,
    largest,
    parts,
)
from fbn_prune.networks.ranking import strongest_first
from fbn_prune.progress import StageClock
from fbn_prune.recipe import Recipe
from fbn_prune.runs.early_checks import named_text
from fbn_prune.runs.opening import OpenRun
from fbn_prune.runs.stages import measuring_dense, rank_scores, refuse_guessing
from fbn_prune.runs.study import Studied, network_count, open_study, with_networks

MOMENT_TOKENS = 8192
"""Calibration tokens for the principal components."""


@dataclass(frozen=True)
class AblationPlan:
    """Which networks to change, how, and the texts to measure on.

    Attributes
    ----------
    action
        "mask" zeroes the networks' neurons, "retain" zeroes all others, "amplify" multiplies them by `factor`.
    factor
        Factor for "amplify".
    networks
        Indices of the networks; empty for all.
    z
        Smallest absolute z-score of a neuron that belongs to a network.
    grow
        Numbers of strongest networks to mask, and to retain, together.
    draws
        Random sets per control.
    texts
        NAME=SOURCE or SOURCE, as in `calibration`; empty for the held-out share of the calibration text.
    tokens
        Largest number of tokens of each text.
    components
        Whether to ablate principal components of the same space as well.
    """

    action: ActionName = "mask"
    factor: float = 2.0
    networks: tuple[int, ...] = ()
    z: float = HUB_Z
    grow: tuple[int, ...] = ()
    draws: int = 20
    texts: tuple[str, ...] = ()
    tokens: int = 4096
    components: bool = False


@dataclass
class AblationResult:
    """What an ablation measured; `--json` prints it as :meth:`to_json` returns it.

    Attributes
    ----------
    dense, networks
        Quality of the unchanged model, and effect of each network by index, strongest first.
    strongest
        Index of the network with the largest effect; `random` and `components` have as many neurons.
    masked, retained
        Effects of the growing sets.
    """

    model: str
    plan: AblationPlan
    rank: str
    dense: Quality
    networks: dict[int, Ablated]
    strongest: int
    random: Band
    components: list[Ablated] = field(default_factory=list)
    masked: list[Step] = field(default_factory=list)
    retained: list[Step] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """Perplexity rise of the strongest network over the mean rise of random sets; None if that is not positive."""
        random_rise = self.random.mean - self.dense.perplexity
        rise = self.networks[self.strongest].quality.perplexity - self.dense.perplexity
        return rise / random_rise if random_rise > 0 else None

    def to_json(self) -> dict[str, Any]:
        """Return all measurements as JSON values."""
        dense = self.dense
        return {
            "model": self.model,
            "action": self.plan.action,
            "factor": self.plan.factor if self.plan.action == "amplify" else None,
            "z": self.plan.z,
            "rank": self.rank,
            "tokens": {name: count for name, (_, count) in dense.texts.items()},
            "dense": dense.perplexity,
            "dense_loss_by_text": dense.losses,
            "dense_tasks": dense.tasks,
            "networks": [
                {"id": network, **ablated.to_json(dense)}
                for network, ablated in self.networks.items()
            ],
            "strongest": self.strongest,
            "ratio_to_random": self.ratio,
            "random": self.random.to_json(dense),
            "components": [one.to_json(dense) for one in self.components],
            "growing": {
                name: [
                    {
                        "n": step.networks,
                        **step.ablated.to_json(dense),
                        "random": step.band.to_json(dense),
                        "components": None
                        if step.components is None
                        else step.components.to_json(dense),
                    }
                    for step in steps
                ]
                for name, steps in (("mask", self.masked), ("retain", self.retained))
            },
        }


def run_ablation(
    recipe: Recipe,
    plan: AblationPlan,
    clock: StageClock,
    on_tasks: Callable[[Any], TaskMeasure] | None = None,
) -> AblationResult:
    """Run an ablation; see :func:`fbn_prune.api.ablate`.

    Parameters
    ----------
    on_tasks
        Returns, for the model's tokenizer, a function that measures the model on tasks; None for texts only.

    Raises
    ------
    InvalidInput
        If a network or the size of a growing set does not exist, a text cannot be read, or a network has no neuron
        with the z-score.
    """
    if plan.draws < 1:
        raise InvalidInput(f"draws = {plan.draws}: at least one random set is needed")
    run = open_study(recipe, clock)
    most = network_count(run.prepared)
    check_sizes(plan.grow, most)
    for network in plan.networks:
        if not 0 <= network < most:
            raise InvalidInput(f"there is no network {network}: give a number from 0 to {most - 1}")
    texts = _texts(run, plan)
    on = with_networks(run)
    networks = on.networks
    scores = rank_scores(on, networks, on.matched)
    order = strongest_first(scores)
    chosen = [n for n in order if n in plan.networks] if plan.networks else order
    components = _components(on, clock) if plan.components else None
    tasks = None if on_tasks is None else on_tasks(on.tokenizer)
    sets = _counts(plan, len(chosen))
    others = sum(sets.values())
    listed = ", ".join(counted(count, name) for name, count in sets.items() if count)
    clock.note(f"ablation: the unchanged model, {listed}, one at a time")
    total, unit = (1 + others) * parts(texts, tasks), "tokens" if tasks is None else "parts"
    with clock.stage("ablation", total, unit) as advance:
        ablation = Ablation(on.adapter, texts, advance, tasks)
        intervene = ablation.action(plan.action, plan.factor)
        start = time.perf_counter()
        with measuring_dense(on, [batch for batches in texts.values() for batch in batches]):
            dense = ablation.dense()
        clock.note_time("ablation", "the unchanged model", time.perf_counter() - start, others)
        refuse_guessing(on, dense.perplexity)
        masks = {n: networks.by_layer(networks.members(n, plan.z)) for n in chosen}
        measured = {n: ablation.measure(intervene, each) for n, each in masks.items()}
        strongest = _strongest(measured, plan.action)
        seed = recipe.seed
        band = ablation.random(intervene, masks[strongest], draws=plan.draws, seed=seed)
        result = AblationResult(
            recipe.model, plan, recipe.rank_or_default, dense, measured, strongest, band
        )
        if components is not None:
            size = measured[strongest].neurons
            result.components = [
                ablation.measure(intervene, networks.by_layer(largest(row, size)))
                for row in components[: len(chosen)]
            ]
        for name, steps in (("mask", result.masked), ("retain", result.retained)):
            act = ablation.action("mask" if name == "mask" else "retain")
            steps += ablation.growing(
                act,
                networks,
                order,
                plan.grow,
                z=plan.z,
                draws=plan.draws,
                seed=seed,
                components=components,
            )
    return result


def _counts(plan: AblationPlan, networks: int) -> dict[str, int]:
    """Return how many sets of neurons of each kind will be changed."""
    controls = 1 if plan.components else 0
    grown = 2 * len(plan.grow)
    return {
        "network": networks,
        "growing set": grown,
        "random set": plan.draws * (1 + grown),
        "principal component": controls * (networks + grown),
    }


def _strongest(measured: dict[int, Ablated], action: ActionName) -> int:
    """Return the network with the largest effect: the highest loss, or the lowest if it is retained alone."""
    sign = -1 if action == "retain" else 1
    return max(measured, key=lambda network: sign * measured[network].quality.loss)


def _components(on: Studied, clock: StageClock) -> Tensor:
    """Return the maps of the principal components, [components, N], ranked by the same rule as the networks.

    The rule "task" is not defined for components; they are then ranked by output energy.
    """
    sample = on.data.calibrating.subset(MOMENT_TOKENS).batches(on.prepared.batch_tokens)
    moment = second_moment(time_courses(on.adapter, on.networks, sample, clock))
    control = principal_networks(on.networks, moment)
    if on.prepared.recipe.rank_or_default == "task":
        by_energy = on.prepared.recipe.model_copy(update={"rank": "energy"})
        on = replace(on, prepared=replace(on.prepared, recipe=by_energy))
    scores = rank_scores(on, control, on.matched)
    return control.maps[strongest_first(scores)]


def _texts(on: OpenRun, plan: AblationPlan) -> dict[str, Sequence[Batch]]:
    """Return the batches of each text to measure on."""
    prepared, batch_tokens = on.prepared, on.prepared.batch_tokens
    if not plan.texts:
        return {"held out": on.data.held_out.subset(plan.tokens).batches(batch_tokens)}
    named: dict[str, str] = {}
    for text in plan.texts:
        if text == "builtin":
            named |= {skill: str(path) for skill, path in builtin.held_out_files().items()}
        else:
            name, source = named_text(text)
            if name in named:
                raise InvalidInput(f"two texts are called {name!r}: write NAME={source}")
            named[name] = source
    return {
        name: first_blocks(
            source,
            on.tokenizer,
            prepared.context,
            tokens=plan.tokens,
            seed=prepared.recipe.seed,
            note=on.clock.note,
        ).batches(batch_tokens)
        for name, source in named.items()
    }
