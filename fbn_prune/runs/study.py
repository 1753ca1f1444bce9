"""Load a model with its networks to study them (`rank`, `ablate`, `compare`), and rank the networks."""

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
from fbn_prune.runs.prepared import Prepared
from fbn_prune.runs.setup import prepare
from fbn_prune.runs.stages import find_networks, match_to_task, rank_scores
from fbn_prune.store import Store


@dataclass(frozen=True, kw_only=True)
class Studied(OpenRun):
    """An open run with its networks and, if there is a task, the calibration text matched to it."""

    networks: FunctionalNetworks
    matched: MatchedCalibration | None


@dataclass(frozen=True)
class Ranking:
    """Networks sorted by score.

    Attributes
    ----------
    model, rank
        The model and the rule that scored the networks.
    order
        Indices of the networks, strongest first.
    networks
        The networks.
    scores
        Score of each network, by index.
    """

    model: str
    rank: str
    order: list[int]
    networks: FunctionalNetworks
    scores: list[float]

    def to_json(self) -> dict[str, Any]:
        """Return the ranking as JSON values: score and size of each network, strongest first."""
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


def open_study(recipe: Recipe, clock: StageClock) -> OpenRun:
    """Load a recipe's texts and its whole model.

    Raises
    ------
    InvalidInput
        If the recipe names something that cannot be used, or the whole model does not fit into memory.
    """
    prepared = prepare(recipe)
    if prepared.memory.streamed:
        layers, rest = layer_bytes(prepared.checkpoint, prepared.dtype)
        free = free_memory(prepared.device)
        raise InvalidInput(
            f"this command needs the whole model in memory: {recipe.model} takes {(sum(layers) + rest) / 1e9:.1f} GB "
            f"plus activations, {free / 1e9:.1f} GB are free (prune and discover can read it layer by layer)"
        )
    return open_run(prepared, clock, whole=True)


def network_count(prepared: Prepared) -> int:
    """Return how many networks a study will have: those of its file, or those to be discovered."""
    if prepared.networks is not None:
        return len(prepared.networks.maps)
    solves = 1 if prepared.recipe.scope == "global" else prepared.layers
    return solves * prepared.recipe.networks


def with_networks(run: OpenRun) -> Studied:
    """Load or discover the networks, and match the calibration text to the task, if there is one.

    Raises
    ------
    InvalidInput
        If the model cannot be used, see :func:`fbn_prune.runs.stages.find_networks`.
    """
    networks = run.prepared.networks or find_networks(run)
    matched = match_to_task(run, networks, Store())
    return Studied(**vars(run), networks=networks, matched=matched)


def run_rank(recipe: Recipe, clock: StageClock) -> Ranking:
    """Score and sort the networks; see :func:`fbn_prune.api.rank`."""
    on = with_networks(open_study(recipe, clock))
    scores = rank_scores(on, on.networks, on.matched)
    order = strongest_first(scores)
    return Ranking(recipe.model, recipe.rank_or_default, order, on.networks, scores.tolist())
