"""Check what a recipe asks of a mixture of experts, before any work.

What the main job can do with other models and not with these is refused by name.
"""

from __future__ import annotations

import torch

from fbn_prune import distributed
from fbn_prune.data.text_files import GENERATED
from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.mixture_family import MixtureFamily
from fbn_prune.pruning.block_cutting import MixturePlan
from fbn_prune.pruning.criteria import CRITERIA, NEED_NETWORKS
from fbn_prune.recipe import Recipe
from fbn_prune.runs.early_checks import check_places
from fbn_prune.runs.machine import chosen_context, chosen_device, chosen_dtype
from fbn_prune.runs.memory import MemoryPlan, plan_memory
from fbn_prune.runs.mixture_memory import MixtureSizes
from fbn_prune.runs.prepared import Prepared, networks_of, task_of

WIDE = 512
"""Experts of this width and more are cut to multiples of 64, which fast kernels want; narrower ones of 8."""

ALIGNED = 8
"""All widths are multiples of this: transformers' kernels for experts want rows of 16 bytes, 8 numbers in bfloat16."""

_REFUSED = (
    "head_sparsity",
    "forget",
    "target_params",
    "target_size",
    "layout",
    "structures",
    "widths",
    "keep_layers",
    "loss_aware",
    "recover",
    "vocabulary",
    "keep_unused_tensors",
)
"""Keys of what is not done on mixtures."""


def refuse_for_mixtures(recipe: Recipe) -> None:
    """Refuse what is not done on mixtures of experts.

    Raises
    ------
    InvalidInput
        The recipe asks for it.
    """
    if distributed.world() > 1:
        raise InvalidInput(
            "mixtures of experts are pruned in one process: start it without torchrun"
        )
    for key in _REFUSED:
        value = getattr(recipe, key)
        if value != type(recipe).model_fields[key].default:
            raise InvalidInput(
                f"{key} = {value}: not done on mixtures of experts: leave it out (docs/mixtures.md says what is)"
            )
    if recipe.writes_text:
        raise InvalidInput(
            f"calibration = {GENERATED}: not done on mixtures of experts: give calibration text"
        )
    if recipe.criterion not in CRITERIA or recipe.criterion in NEED_NETWORKS:
        raise InvalidInput(
            f"criterion = {recipe.criterion}: not done on mixtures of experts: choose another"
        )


def prepared_mixture(recipe: Recipe, checkpoint: Checkpoint) -> Prepared:
    """Check everything that a recipe names but its text, for a mixture's open checkpoint.

    Raises
    ------
    InvalidInput
        Something cannot be used, or is not done on mixtures of experts.
    """
    refuse_for_mixtures(recipe)
    check_places(recipe, checkpoint.path, checkpoint.total_bytes)
    device = chosen_device(recipe.device)
    dtype = chosen_dtype(recipe.dtype, device, checkpoint.storage_dtype)
    return prepared_mixture_for(recipe, checkpoint, device, dtype)


def prepared_mixture_for(
    recipe: Recipe,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    memory: MemoryPlan | None = None,
) -> Prepared:
    """Check a recipe against an open checkpoint or the headers of a mixture in memory.

    Parameters
    ----------
    memory
        Where weights and activations are kept. Default: planned from the recipe.

    Raises
    ------
    InvalidInput
        The context, the networks, the number of experts or the task do not fit the model.
    """
    family = checkpoint.family
    assert isinstance(family, MixtureFamily)
    context = chosen_context(recipe, family.context_length(checkpoint.config))
    if recipe.experts is not None:
        family.check_count(recipe.experts)
    networks = networks_of(recipe, family.widths(checkpoint.config))
    return Prepared(
        recipe,
        checkpoint,
        device,
        dtype,
        context,
        recipe.width_multiple or ALIGNED,
        networks,
        None,
        frozenset(),
        memory or plan_memory(recipe, checkpoint, device, dtype, context, MixtureSizes),
        task_of(recipe),
    )


def require_size(prepared: Prepared) -> None:
    """Refuse a recipe that does not say how much of a mixture stays, or says what its config cannot.

    Raises
    ------
    InvalidInput
        It does not.
    """
    recipe, family = prepared.recipe, prepared.family
    assert isinstance(family, MixtureFamily)
    if recipe.stated_budget is None and recipe.keep_networks is None:
        raise InvalidInput(
            f"{recipe.model} is a mixture of experts: give --sparsity (neurons of each expert), --experts (whole "
            "experts to keep in each layer), both, or --keep-networks"
        )
    if recipe.sparsity is not None or recipe.stated_budget is None:
        width_for(family, 1 - (recipe.sparsity or 0.5), recipe.width_multiple)


def width_for(family: MixtureFamily, kept: float, multiple: int | None) -> int:
    """Return the width of the experts that keeps about this share of their neurons.

    Parameters
    ----------
    multiple
        Widths are multiples of this. Default: 64, or 8 for narrower experts than :data:`WIDE`.

    Raises
    ------
    InvalidInput
        An expert is narrower than the multiple, or the config can state no width but the present one.
    """
    full = family.expert_width
    multiple = multiple or min(64 if full >= WIDE else 8, full)
    widths = [
        width
        for width in range(multiple, full, multiple)
        if width % ALIGNED == 0 and family.states_width(width)
    ]
    if not widths:
        raise InvalidInput(
            f"width_multiple = {multiple}: no multiple of it and of {ALIGNED} is a width for experts of {full} "
            "neurons: give another"
        )
    return min(widths, key=lambda width: (abs(width - kept * full), width))


def plan_of(recipe: Recipe, family: MixtureFamily, covered: float | None = None) -> MixturePlan:
    """Return how a recipe cuts a mixture.

    Parameters
    ----------
    covered
        The share of the neurons that the kept networks cover; None without networks.

    Raises
    ------
    InvalidInput
        It says what the model does not allow.
    """
    count, width = recipe.experts or family.count, family.expert_width
    share = None if recipe.sparsity is None else 1 - recipe.sparsity
    if recipe.stated_budget is None:
        share = covered
    if share is not None:
        width = width_for(family, share, recipe.width_multiple)
    return MixturePlan(count, width, recipe.expert_criterion, recipe.criterion)


def notes_of(recipe: Recipe, family: MixtureFamily, plan: MixturePlan) -> list[str]:
    """Return what the user should know of a plan."""
    lines = []
    if recipe.sparsity is not None:
        wanted = (1 - recipe.sparsity) * family.expert_width
        if abs(plan.width - wanted) >= 1:
            lines.append(
                f"each expert keeps {plan.width} of {family.expert_width} neurons, the nearest width to {wanted:.0f} "
                "that the config and --width-multiple allow"
            )
    if family.top_k_of(plan.experts) < family.top_k:
        lines.append(
            f"a token is sent to {family.top_k_of(plan.experts)} experts instead of {family.top_k}: no more are left"
        )
    return lines
