"""Compare ways to cut a model, each kind of model by its own ways."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fbn_prune.model.mixture_checkpoint import is_mixture
from fbn_prune.progress import StageClock
from fbn_prune.recipe import Recipe
from fbn_prune.runs.compare import Comparison, run_comparison
from fbn_prune.runs.mixture_comparison import compare_mixture


def run_any_comparison(
    recipe: Recipe,
    criteria: Sequence[str],
    kept: Sequence[float],
    path: Path | None,
    clock: StageClock,
) -> Comparison:
    """Measure the held-out perplexity of every criterion at several budgets; see :func:`fbn_prune.api.compare`."""
    of_experts = is_mixture(recipe.model, trust_remote_code=recipe.trust_remote_code)
    compared = compare_mixture if of_experts else run_comparison
    return compared(recipe, criteria, kept, path, clock)
