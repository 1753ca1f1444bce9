"""A model loaded with its networks, to be looked at and not changed; and the order of those networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fbn_prune.errors import InvalidInput
from fbn_prune.model.placement import layer_bytes
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.networks.ranking import strongest_first
from fbn_prune.networks.task_matching import MatchedCalibration
from fbn_prune.progress import StageClock
from fbn_prune.recipe import Recipe
from fbn_prune.runs.memory import free_memory
from fbn_prune.runs.opening import OpenRun, open_run
from fbn_prune.runs.setup import prepare
from fbn_prune.runs.stages import find_networks, match_to_task, rank_scores
from fbn_prune.store import Store


@dataclass(frozen=True, kw_only=True)
class Studied(OpenRun):
    """An open run with its networks, ready to be looked at."""

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
    run = open_run(prepared, clock, whole=True)
    networks = prepared.networks or find_networks(run)
    matched = match_to_task(run, networks, Store())
    return Studied(**vars(run), networks=networks, matched=matched)


def run_rank(recipe: Recipe, clock: StageClock) -> Ranking:
    """The `rank` command: every network with its score, strongest first."""
    on = study(recipe, clock)
    scores = rank_scores(on, on.networks, on.matched)
    order = strongest_first(scores)
    return Ranking(recipe.model, recipe.rank_or_default, order, on.networks, scores.tolist())
