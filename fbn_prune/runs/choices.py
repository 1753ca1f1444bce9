"""What a pruning run decides before it cuts: the networks to keep, the size that they ask for, and the widths."""

from __future__ import annotations

from collections.abc import Sequence

from fbn_prune.errors import InvalidInput
from fbn_prune.export.directory import check_room
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.progress import StageClock
from fbn_prune.pruning.allocation import budget_from_networks
from fbn_prune.pruning.layout import (
    UNIFORM,
    Layout,
    LayoutRequest,
    Subject,
    choose_layout,
    trial_bytes,
)
from fbn_prune.pruning.library import library_bytes
from fbn_prune.pruning.search import Searched, search_layout
from fbn_prune.recipe import Recipe
from fbn_prune.runs.budget import Budget
from fbn_prune.runs.prepared import Prepared


def kept_networks(recipe: Recipe, order: list[int]) -> list[int]:
    """Return the networks to keep: `keep_networks` of them, or all if only the size of the result is given."""
    if recipe.stated_budget is not None and recipe.keep_networks is None:
        return order
    if order and (recipe.keep_networks or 0) > len(order):
        raise InvalidInput(
            f"keep_networks = {recipe.keep_networks}: only {len(order)} networks were found; "
            "keep fewer, or raise --networks"
        )
    return order[: recipe.kept_networks_or_default]


def layout_request(
    prepared: Prepared, networks: FunctionalNetworks | None, kept: Sequence[int]
) -> LayoutRequest:
    """Return what the recipe asks; the kept networks set the budget if nothing else does."""
    recipe, budget = prepared.recipe, prepared.budget
    if budget is None:
        assert networks is not None
        budget = Budget(budget_from_networks(networks, kept), most=False)
    return LayoutRequest(
        layout=recipe.layout,
        rule=recipe.widths,
        budget=budget.neurons,
        most=budget.most,
        full=tuple(prepared.widths),
        multiple=prepared.width_multiple,
        whole=prepared.whole,
        rest=prepared.rest,
        narrows="neurons" in recipe.removable,
        leaves_out=recipe.leaves_out_layers,
        heads=prepared.heads,
    )


def chosen_layout(
    prepared: Prepared, subject: Subject, request: LayoutRequest, clock: StageClock
) -> tuple[Layout, Searched | None]:
    """Choose the widths, if the disk has room for the cuts that are tried.

    A search has cut the layers to them as well, unless the cut is to differ from the one that it tried.
    """
    hidden = prepared.family.hidden_size(prepared.checkpoint.config)
    searched = prepared.recipe.searches_widths
    itemsize = prepared.dtype.itemsize
    needed = (
        library_bytes(request, hidden, itemsize, subject.blocks.tokens)
        if searched
        else trial_bytes(request, hidden, itemsize)
    )
    check_room(subject.scratch, needed, "folder of temporary files")
    if not searched:
        return choose_layout(subject, request, clock), None
    found = search_layout(subject, request, clock)
    options = subject.options
    same = request.narrows and not options.sequential and options.head_groups is None
    return found.layout, found if same else None


def verdict(layout: Layout) -> str:
    """Return one line on the trial of layouts: the gain of ragged widths, and the choice."""
    ragged = min(rise for rule, rise in layout.trials.items() if rule != UNIFORM)
    uniform = layout.trials[UNIFORM]
    gain = 1 - ragged / uniform if uniform > 0 else 0.0
    chosen = "uniform" if layout.rule == UNIFORM else f"ragged (widths by {layout.rule})"
    what = "loss rise" if layout.search is None else "divergence from the dense model"
    return (
        f"ragged widths avoid {gain:.0%} of the {what} on held-back calibration text "
        f"({uniform:.3f} nats with uniform widths, {ragged:.3f} ragged) but need trust_remote_code to load; "
        f"chosen: {chosen}"
    )
