"""The `ablate` command's run: networks masked, retained alone or amplified, measured beside random sets and components.

Each network by itself, growing sets of them in the order of their rank, and two controls of equal size: random sets,
drawn many times, and principal components of the same space, ranked as the networks are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fbn_prune.data import builtin
from fbn_prune.data.calibration import Batch, TokenBlocks, read_documents
from fbn_prune.data.calibration import tokenize_document as tokenize
from fbn_prune.errors import InvalidInput
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
)
from fbn_prune.networks.ranking import strongest_first
from fbn_prune.progress import StageClock
from fbn_prune.recipe import Recipe
from fbn_prune.runs.stages import rank_scores
from fbn_prune.runs.study import Studied, study

CHARACTERS_PER_TOKEN = 16
MOMENT_TOKENS = 8192
"""Tokens that the principal components of the control are found on."""


@dataclass(frozen=True)
class AblationPlan:
    """What to ablate and what on.

    Attributes
    ----------
    networks
        Which networks, by id; empty for all.
    z
        Neurons of a network are those with abs z-score of at least this.
    grow
        Sizes of growing sets to mask and to retain.
    texts
        NAME=SOURCE or SOURCE, as in `calibration`; empty for the recipe's held-out share.
    tokens
        Of each text, at most.
    components
        Whether to ablate principal components of the same space, too.
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
    """What an ablation measured; :meth:`to_json` is the object that `--json` prints."""

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
        """The strongest network's rise of perplexity in units of the random sets' mean rise, where that is a rise."""
        of_random = self.random.mean - self.dense.perplexity
        of_network = self.networks[self.strongest].quality.perplexity - self.dense.perplexity
        return of_network / of_random if of_random > 0 else None

    def to_json(self) -> dict[str, Any]:
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
    """The `ablate` command.

    Parameters
    ----------
    on_tasks
        From the model's tokenizer to what measures the model on tasks; None for texts alone.

    Raises
    ------
    InvalidInput
        A network or size of a growing set that does not exist, a text that cannot be read, or a network without a
        neuron of that z-score.
    """
    if plan.draws < 1:
        raise InvalidInput(f"draws = {plan.draws}: at least one random set is needed")
    on = study(recipe, clock)
    networks, count = on.networks, len(on.networks.maps)
    check_sizes(plan.grow, count)
    for network in plan.networks:
        networks.members(network)  # refuses one that does not exist
    texts = _texts(on, plan)
    scores = rank_scores(on, networks, on.matched)
    order = strongest_first(scores)
    chosen = [n for n in order if n in plan.networks] if plan.networks else order
    components = _components(on, clock) if plan.components else None
    controls = 0 if components is None else 1
    measurements = 1 + len(chosen) * (1 + controls) + plan.draws
    measurements += 2 * len(plan.grow) * (1 + plan.draws + controls)
    with clock.stage("ablation", measurements, "measurements") as advance:
        tasks = None if on_tasks is None else on_tasks(on.tokenizer)
        ablation = Ablation(on.adapter, texts, advance, tasks)
        intervene = ablation.action(plan.action, plan.factor)
        dense = ablation.dense()
        sets = {n: networks.by_layer(networks.members(n, plan.z)) for n in chosen}
        measured = {n: ablation.measure(intervene, masks) for n, masks in sets.items()}
        strongest = _strongest(measured, plan.action)
        seed = recipe.seed
        band = ablation.random(intervene, sets[strongest], draws=plan.draws, seed=seed)
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


def _strongest(measured: dict[int, Ablated], action: ActionName) -> int:
    """The network that matters most: that costs most without it, or least with it alone."""
    sign = -1 if action == "retain" else 1
    return max(measured, key=lambda network: sign * measured[network].quality.loss)


def _components(on: Studied, clock: StageClock) -> Tensor:
    """Maps of the principal components, [components, N], in the order of the same rank as the networks.

    How far a component stands out on a task is not measured: with `rank` task they go by output energy.
    """
    few = on.data.calibrating.subset(MOMENT_TOKENS).batches(on.prepared.batch_tokens)
    moment = second_moment(time_courses(on.adapter, on.networks, few, clock))
    control = principal_networks(on.networks, moment)
    if on.prepared.recipe.rank_or_default == "task":
        by_energy = on.prepared.recipe.model_copy(update={"rank": "energy"})
        on = replace(on, prepared=replace(on.prepared, recipe=by_energy))
    scores = rank_scores(on, control, on.matched)
    return control.maps[strongest_first(scores)]


def _texts(on: Studied, plan: AblationPlan) -> dict[str, Sequence[Batch]]:
    """The texts to measure on, tokenized."""
    batch_tokens = on.prepared.batch_tokens
    if not plan.texts:
        return {"held out": on.data.held_out.subset(plan.tokens).batches(batch_tokens)}
    named: dict[str, str] = {}
    for text in plan.texts:
        if text == "builtin":
            named |= {skill: str(path) for skill, path in builtin.held_out_files().items()}
        else:
            name, separator, source = text.partition("=")
            named[name if separator else Path(text).stem] = source if separator else text
    return {
        name: read_blocks(on, source, plan.tokens).batches(batch_tokens)
        for name, source in named.items()
    }


def read_blocks(on: Studied, source: str, tokens: int) -> TokenBlocks:
    """The beginning of a text in blocks of the run's context.

    Raises
    ------
    InvalidInput
        The source cannot be read or gives no block.
    """
    prepared = on.prepared
    characters = (tokens + prepared.context) * CHARACTERS_PER_TOKEN
    blocks = [
        block
        for document in read_documents(source, characters=characters, seed=prepared.recipe.seed)
        for block in tokenize(on.tokenizer, document, prepared.context)
    ]
    if not blocks:
        raise InvalidInput(f"text {source!r} gives no block of tokens")
    return TokenBlocks(tuple(blocks), prepared.context, (source,)).subset(tokens)
