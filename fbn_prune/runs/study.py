"""A model loaded with its networks, to be looked at and not changed; and the order of those networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fbn_prune.data.calibration import CalibrationData
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.placement import layer_bytes
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.networks.ranking import strongest_first
from fbn_prune.networks.task_matching import MatchedCalibration
from fbn_prune.progress import StageClock
from fbn_prune.recipe import Recipe
from fbn_prune.runs.memory import free_memory
from fbn_prune.runs.setup import Prepared, prepare
from fbn_prune.runs.stages import (
    find_networks,
    load_calibration,
    load_task,
    match_to_task,
    rank_scores,
)


@dataclass(frozen=True)
class Studied:
    """A loaded model with its networks, ready to be looked at."""

    prepared: Prepared
    adapter: ModelAdapter
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


def study(recipe: Recipe, clock: StageClock) -> Studied:
    """Load a recipe's model, and its networks or find them; match the task, if there is one.

    Raises
    ------
    InvalidInput
        The recipe names what cannot be used, or the model does not fit into memory, where a study has it whole.
    """
    prepared = prepare(recipe)
    if prepared.memory.streamed:
        layers, rest = layer_bytes(prepared.checkpoint, prepared.dtype)
        free = free_memory(prepared.device)
        raise InvalidInput(
            f"this command has the whole model in memory: {recipe.model} takes {(sum(layers) + rest) / 1e9:.1f} GB and "
            f"more beside it, {free / 1e9:.1f} GB are free (prune and discover read such a model layer by layer)"
        )
    tokenizer = prepared.checkpoint.load_tokenizer()
    with clock.stage("calibration"):
        data = load_calibration(prepared, tokenizer)
        task = load_task(prepared, tokenizer, data)
        data = data if task is None else task.data
    with clock.stage("load"):
        adapter = prepared.load_whole_model()
    networks = prepared.networks
    if networks is None:
        networks = find_networks(prepared, adapter, tokenizer, data, clock)
    matched = None if task is None else match_to_task(prepared, adapter, networks, task, clock)
    return Studied(prepared, adapter, tokenizer, data, networks, matched)


def run_rank(recipe: Recipe, clock: StageClock) -> Ranking:
    """The `rank` command: every network with its score, strongest first."""
    on = study(recipe, clock)
    scores = rank_scores(on.prepared, on.adapter, on.networks, on.data, on.matched, clock)
    order = strongest_first(scores)
    return Ranking(recipe.model, recipe.rank_or_default, order, on.networks, scores.tolist())
