"""Compare ways to cut a mixture of experts at the same number of expert parameters, on one calibration sample."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fbn_prune.data.calibration import Batch, TokenBlocks, first_blocks
from fbn_prune.errors import InvalidInput
from fbn_prune.export.report.facts import Comparison as Compared
from fbn_prune.model.mixture_family import MixtureFamily
from fbn_prune.model.perplexity import NonFiniteLogits, perplexity
from fbn_prune.progress import StageClock
from fbn_prune.pruning.block_cutting import MixturePlan
from fbn_prune.pruning.mixture_cutting import cut_experts
from fbn_prune.recipe import Recipe
from fbn_prune.runs.compare import Cell, Comparison, plot_path, replace_file
from fbn_prune.runs.early_checks import check_results
from fbn_prune.runs.mixture import experts_of, options_of
from fbn_prune.runs.mixture_setup import width_for
from fbn_prune.runs.opening import OpenRun
from fbn_prune.runs.stages import measuring_dense, refuse_guessing
from fbn_prune.runs.study import open_study, with_networks

WAYS = ("neurons", "experts", "both", "reap", "reap-refit", "frequency", "random")
"""Neurons inside the experts, whole experts, and both together, all by second order with a refit; whole experts by
baselines without one, and by REAP with our refit."""

WIDEST_MISS = 0.02
"""Neurons and experts together may miss a share of the parameters by this much to be cut about alike."""


def compare_mixture(
    recipe: Recipe,
    ways: Sequence[str],
    kept: Sequence[float],
    path: Path | None,
    clock: StageClock,
    *,
    texts: Sequence[str] = (),
    text_tokens: int = sys.maxsize,
) -> Comparison:
    """Measure the perplexity of every way at several budgets.

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
    texts, text_tokens
        Texts to measure on, and the tokens to read of each. Default: the held-out share of the calibration text.

    Raises
    ------
    InvalidInput
        A way or a share is unknown, or the recipe cannot be used.
    """
    names = list(ways) or list(WAYS)
    _check(names, kept, path)
    on = open_study(recipe, clock)
    _, family = experts_of(on)
    plans = {(name, share): _plan(family, name, share, recipe) for share in kept for name in names}
    measured = on.data.held_out if not texts else _read(on, texts, text_tokens)
    batches = measured.batches(on.prepared.batch_tokens)
    facts = {
        "held_out_fingerprint": measured.fingerprint,
        "held_out_tokens": measured.tokens,
        "calibration_fingerprint": on.data.calibrating.fingerprint,
        "seed": recipe.seed,
        "sequential": recipe.sequential,
        "ways": {
            f"{name} {share}": {"experts": plan.experts, "width": plan.width}
            for (name, share), plan in plans.items()
        },
    }
    widths = {
        share: [width_for(family, share, recipe.width_multiple)] * len(family.mlp_layers)
        for share in kept
    }
    with measuring_dense(on, batches):
        dense = perplexity(on.adapter, batches)
    refuse_guessing(on, dense)
    comparison = Comparison(recipe.model, facts, dense, widths)
    _measure(on, plans, batches, comparison)
    if path is not None:
        from fbn_prune.export.report.figures import comparison_svg

        comparison.save(path)
        shown = comparison_svg(Compared.model_validate(comparison.to_json()))
        replace_file(plot_path(path), shown)
    return comparison


def _check(names: Sequence[str], kept: Sequence[float], path: Path | None) -> None:
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


def _read(on: OpenRun, texts: Sequence[str], tokens: int) -> TokenBlocks:
    context = on.prepared.context
    found = [first_blocks(text, on.tokenizer, context, tokens=tokens) for text in texts]
    blocks = tuple(block for each in found for block in each.blocks)
    return TokenBlocks(blocks, context, tuple(texts))


def _measure(
    on: OpenRun,
    plans: Mapping[Cell, MixturePlan],
    batches: Sequence[Batch],
    comparison: Comparison,
) -> None:
    """Make the cuts of all plans in one pass, and measure each."""
    adapter, _ = experts_of(on)
    blocks = on.data.calibrating
    if on.task is not None and (matched := with_networks(on).matched) is not None:
        blocks = matched.blocks
    options = options_of(on)
    calibrating = blocks.batches(on.prepared.batch_tokens)
    made, _ = cut_experts(adapter, calibrating, plans, options, clock=on.clock)
    for line in dict.fromkeys(line for cuts in made.values() for line in cuts.lines()):
        on.clock.note(f"warning: {line}")
    for cell, cuts in made.items():
        with adapter.trying_experts(cuts.cuts, round_to=options.round_to):
            comparison.cells[cell] = _perplexity(on, batches)


def _perplexity(on: OpenRun, batches: Sequence[Batch]) -> float:
    total = sum(batch.tokens for batch in batches)
    try:
        with on.clock.stage("comparison", total, "tokens") as advance:
            return perplexity(on.adapter, batches, advance)
    except NonFiniteLogits:
        return math.inf


def _plan(family: MixtureFamily, way: str, share: float, recipe: Recipe) -> MixturePlan:
    multiple, full = recipe.width_multiple, family.expert_width
    if way == "neurons":
        return MixturePlan(family.count, width_for(family, share, multiple))
    counts = [
        count
        for count in range(family.groups, family.count + 1, family.groups)
        if family.groups == 1 or count >= 2 * family.groups
    ]
    if way == "both":
        pairs = [(c, width_for(family, share * family.count / c, multiple)) for c in counts]
        missed = {(c, w): abs(c * w / (family.count * full) - share) for c, w in pairs}
        near = [p for p in pairs if missed[p] <= min(missed.values()) + WIDEST_MISS]
        count, width = min(near, key=lambda p: abs(p[0] / family.count - p[1] / full))
        return MixturePlan(count, width)
    count = min(counts, key=lambda count: (abs(count - share * family.count), count))
    if way == "reap-refit":
        return MixturePlan(count, full, "reap", refit=True)
    return MixturePlan(count, full, "second-order" if way == "experts" else way)
