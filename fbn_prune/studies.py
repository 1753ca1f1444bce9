"""Runs that look at a model and change nothing: the order of its networks, and what ablating them does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fbn_prune import builtin
from fbn_prune.calibration import Batch, CalibrationData, TokenBlocks, read_documents
from fbn_prune.calibration import tokenize_document as tokenize
from fbn_prune.errors import InvalidInput
from fbn_prune.matching import MatchedCalibration
from fbn_prune.networks.ablation import (
    Ablated,
    Ablation,
    ActionName,
    Band,
    Quality,
    Step,
    check_sizes,
    largest,
)
from fbn_prune.networks.activity import principal_maps, second_moment, time_courses
from fbn_prune.networks.functional_networks import HUB_Z, FunctionalNetworks
from fbn_prune.networks.ranking import strongest_first
from fbn_prune.prepared import Prepared, prepare
from fbn_prune.progress import StageClock
from fbn_prune.recipe import Recipe
from fbn_prune.stages import (
    find_networks,
    load_calibration,
    load_task,
    match_to_task,
    rank_scores,
)

CHARACTERS_PER_TOKEN = 16
MOMENT_TOKENS = 8192
"""Tokens that the principal components of the control are found on."""


@dataclass(frozen=True)
class Studied:
    """A loaded model with its networks, ready to be looked at."""

    prepared: Prepared
    model: PreTrainedModel
    tokenizer: Any
    data: CalibrationData
    networks: FunctionalNetworks
    matched: MatchedCalibration | None


@dataclass(frozen=True)
class Ranking:
    """Networks by falling score."""

    model: str
    rank: str
    order: list[int]
    networks: FunctionalNetworks
    scores: list[float]

    def to_json(self) -> dict[str, Any]:
        networks = self.networks
        return {
            "model": self.model,
            "rank": self.rank,
            "networks": [
                {
                    "id": network,
                    "score": self.scores[network],
                    "hubs": int(networks.hubs(network).sum()),
                    "members": int(networks.members(network).sum()),
                    "layers_spanned": len(networks.layers_spanned(network)),
                }
                for network in self.order
            ],
        }


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
                    }
                    for step in steps
                ]
                for name, steps in (("mask", self.masked), ("retain", self.retained))
            },
        }


def study(recipe: Recipe, clock: StageClock) -> Studied:
    """Load a recipe's model, and its networks or find them; match the task, if there is one."""
    prepared = prepare(recipe)
    tokenizer = prepared.checkpoint.load_tokenizer()
    with clock.stage("calibration"):
        data = load_calibration(prepared, tokenizer)
        task = load_task(prepared, tokenizer, data)
        data = data if task is None else task.data
    with clock.stage("load"):
        model = prepared.load_model()
    networks = prepared.networks
    if networks is None:
        networks = find_networks(prepared, model, tokenizer, data, clock)
    matched = None if task is None else match_to_task(prepared, model, networks, task, clock)
    return Studied(prepared, model, tokenizer, data, networks, matched)


def run_rank(recipe: Recipe, clock: StageClock) -> Ranking:
    """The `rank` command: every network with its score, strongest first."""
    on = study(recipe, clock)
    scores = rank_scores(on.prepared, on.model, on.networks, on.data, on.matched, clock)
    order = strongest_first(scores)
    return Ranking(recipe.model, recipe.rank_or_default, order, on.networks, scores.tolist())


def run_ablation(recipe: Recipe, plan: AblationPlan, clock: StageClock) -> AblationResult:
    """The `ablate` command.

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
    scores = rank_scores(on.prepared, on.model, networks, on.data, on.matched, clock)
    order = strongest_first(scores)
    chosen = [n for n in order if n in plan.networks] if plan.networks else order
    measurements = 1 + len(chosen) * (1 + plan.components) + plan.draws
    measurements += 2 * len(plan.grow) * (1 + plan.draws)
    with clock.stage("ablation", measurements, "measurements") as advance:
        ablation = Ablation(on.model, on.prepared.family, texts, advance)
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
        if plan.components:
            size = measured[strongest].neurons
            maps = principal_maps(networks, _moment(on, clock))[: len(chosen)]
            result.components = [
                ablation.measure(intervene, networks.by_layer(largest(row, size))) for row in maps
            ]
        for name, steps in (("mask", result.masked), ("retain", result.retained)):
            act = ablation.action("mask" if name == "mask" else "retain")
            steps += ablation.growing(
                act, networks, order, plan.grow, z=plan.z, draws=plan.draws, seed=seed
            )
    return result


def _strongest(measured: dict[int, Ablated], action: ActionName) -> int:
    """The network that matters most: that costs most without it, or least with it alone."""
    sign = -1 if action == "retain" else 1
    return max(measured, key=lambda network: sign * measured[network].quality.loss)


def _moment(on: Studied, clock: StageClock) -> Any:
    few = on.data.calibrating.subset(MOMENT_TOKENS).batches(on.prepared.batch_tokens)
    return second_moment(time_courses(on.model, on.prepared.family, on.networks, few, clock))


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
