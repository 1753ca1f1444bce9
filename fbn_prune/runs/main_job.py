"""The main job, from a recipe to a smaller checkpoint, for models of every kind.

:func:`fbn_prune.runs.setup.prepare` refuses invalid input before any work; the output appears when it is complete.
"""

from __future__ import annotations

from fbn_prune import distributed
from fbn_prune.model.mixture_family import MixtureFamily
from fbn_prune.progress import StageClock
from fbn_prune.recipe import Recipe
from fbn_prune.runs.dry_run import Plan, plan
from fbn_prune.runs.mixture import MixtureRun
from fbn_prune.runs.mixture_dry_run import plan_mixture
from fbn_prune.runs.mixture_setup import require_size
from fbn_prune.runs.opening import open_run, store_of
from fbn_prune.runs.prune import PruneRun
from fbn_prune.runs.result import PruneResult
from fbn_prune.runs.setup import prepare, require_layout


def run_prune(recipe: Recipe, clock: StageClock) -> PruneResult:
    """Run the main job; see :func:`fbn_prune.prune_checkpoint`. Without an `output`, nothing is written.

    Raises
    ------
    InvalidInput
        If the recipe cannot be used (:func:`prepare`), or a text cannot be read or is too short.
    FbnPruneError
        If the pruned model does not work, or the output cannot be written.
    """
    prepared = prepare(recipe, clock)
    of_experts = isinstance(prepared.family, MixtureFamily)
    (require_size if of_experts else require_layout)(prepared)
    for line in prepared.notes:
        clock.note(line)
    kind = MixtureRun if of_experts else PruneRun
    with distributed.joined(prepared.device), store_of(prepared) as store:
        return kind(open_run(prepared, clock, store=store), store).run()


def predict(recipe: Recipe) -> Plan:
    """Predict the size, memory and time of a run; see :func:`fbn_prune.api.predict`."""
    prepared = prepare(recipe)
    if isinstance(prepared.family, MixtureFamily):
        require_size(prepared)
        return plan_mixture(prepared)
    return plan(prepared)
