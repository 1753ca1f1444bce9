"""Compare ways to cut a mixture of experts at the same number of expert parameters, on one calibration sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from fbn_prune.data.calibration import Batch
from fbn_prune.errors import InvalidInput
from fbn_prune.export.report.facts import Comparison as Compared
from fbn_prune.model.mixture_family import MixtureFamily
from fbn_prune.model.perplexity import NonFiniteLogits, perplexity
from fbn_prune.progress import StageClock
from fbn_prune.pruning.block_cutting import MixturePlan
from fbn_prune.pruning.mixture_cutting import cut_experts
from fbn_prune.recipe import Recipe
from fbn_prune.runs.compare import Comparison, plot_path, replace_file
from fbn_prune.runs.early_checks import check_results
from fbn_prune.runs.mixture import experts_of, options_of
from fbn_prune.runs.mixture_setup import width_for
from fbn_prune.runs.opening import OpenRun
from fbn_prune.runs.stages import measuring_dense, refuse_guessing
from fbn_prune.runs.study import open_study, with_networks

WAYS = ("neurons", "experts", "reap", "frequency", "random")
"""Neurons inside the experts and whole experts, both by second order with a refit; then whole experts by baselines
without one."""


def compare_mixture(
    recipe: Recipe,
    ways: Sequence[str],
    kept: Sequence[float],
    path: Path | None,
    clock: StageClock,
) -> Comparison:
    """Measure the held-out perplexity of every way at several budgets.

    Parameters
    ----------
    recipe
        The model, its calibration text and the settings of the cut.
    ways
        Names in :data:`WAYS`. Default: all.
    kept
        Shares of the expert parameters to keep.
    path
        JSON file for the results, with a plot beside it; it must not exist.

    Raises
    ------
    InvalidInput
        A way or a share is unknown, or the recipe cannot be used.
    """
    names = list(ways) or list(WAYS)
    for name in names:
        if name not in WAYS:
            raise InvalidInput(
                f"criterion {name!r}: on a mixture of experts choose from {', '.join(WAYS)}"
            )
    for share in kept:
        if not 0 < share < 1:
            raise InvalidInput(f"kept = {share}: give a share of the expert parameters below 1")
    check_results(path)
    if path is not None and (path.exists() or path == plot_path(path)):
        raise InvalidInput(
            f"{path} exists or names the plot: give another .json file for the results"
        )
    on = open_study(recipe, clock)
    adapter, family = experts_of(on)
    plans = {
        f"{name} {share}": _plan(family, name, share, recipe) for share in kept for name in names
    }
    facts = {
        "held_out_fingerprint": on.data.held_out.fingerprint,
        "calibration_fingerprint": on.data.calibrating.fingerprint,
        "seed": recipe.seed,
        "sequential": recipe.sequential,
        "ways": {
            name: {"experts": plan.experts, "width": plan.width} for name, plan in plans.items()
        },
    }
    widths = {
        share: [_plan(family, "neurons", share, recipe).width] * len(family.mlp_layers)
        for share in kept
    }
    blocks = on.data.calibrating
    if recipe.task is not None and (matched := with_networks(on).matched) is not None:
        blocks = matched.blocks
    batches = blocks.batches(on.prepared.batch_tokens)
    held_out = on.data.held_out.batches(on.prepared.batch_tokens)
    with measuring_dense(on, held_out):
        dense = perplexity(adapter, held_out)
    refuse_guessing(on, dense)
    comparison = Comparison(recipe.model, facts, dense, widths)
    options = options_of(on)
    made, _ = cut_experts(adapter, batches, plans, options, clock=clock)
    for line in dict.fromkeys(line for cuts in made.values() for line in cuts.lines()):
        clock.note(f"warning: {line}")
    for share in kept:
        for name in names:
            cuts = made[f"{name} {share}"].cuts
            with adapter.trying_experts(cuts, round_to=options.round_to):
                comparison.cells[name, share] = _perplexity(on, held_out)
    if path is not None:
        from fbn_prune.export.report.figures import comparison_svg

        comparison.save(path)
        shown = comparison_svg(Compared.model_validate(comparison.to_json()))
        replace_file(plot_path(path), shown)
    return comparison


def _perplexity(on: OpenRun, batches: Sequence[Batch]) -> float:
    total = sum(batch.tokens for batch in batches)
    try:
        with on.clock.stage("comparison", total, "tokens") as advance:
            return perplexity(on.adapter, batches, advance)
    except NonFiniteLogits:
        return math.inf


def _plan(family: MixtureFamily, way: str, share: float, recipe: Recipe) -> MixturePlan:
    if way == "neurons":
        return MixturePlan(family.count, width_for(family, share, recipe.width_multiple))
    counts = [
        count
        for count in range(family.groups, family.count + 1, family.groups)
        if family.groups == 1 or count >= 2 * family.groups
    ]
    count = min(counts, key=lambda count: (abs(count - share * family.count), count))
    return MixturePlan(count, family.expert_width, "second-order" if way == "experts" else way)
