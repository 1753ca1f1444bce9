"""Open and check everything that a recipe names before any work; all invalid input is refused here."""

from __future__ import annotations

import torch

from fbn_prune.data import builtin
from fbn_prune.data.examples import read_examples
from fbn_prune.data.tasks import Task
from fbn_prune.errors import InvalidInput
from fbn_prune.model.attention_blocks import require_attention
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.depth import require_depth
from fbn_prune.model.mixture_checkpoint import open_any
from fbn_prune.model.mixture_family import MixtureFamily
from fbn_prune.model.streaming import check_tensors
from fbn_prune.model.surgery import require_bias
from fbn_prune.model.vocabulary import VocabularyCut
from fbn_prune.progress import StageClock
from fbn_prune.pruning.allocation import at_most, default_multiple, uniform_widths
from fbn_prune.pruning.layout import HeadLevels
from fbn_prune.recipe import Recipe
from fbn_prune.runs.budget import (
    ModelSize,
    head_levels,
    kept_head_groups,
    other_parameters,
    stated_budget,
    whole_layers,
)
from fbn_prune.runs.early_checks import check_places
from fbn_prune.runs.machine import chosen_context, chosen_device, chosen_dtype
from fbn_prune.runs.memory import MemoryPlan, plan_memory
from fbn_prune.runs.mixture_setup import prepared_mixture
from fbn_prune.runs.prepared import Prepared, networks_of, task_of
from fbn_prune.runs.vocabulary import VocabularyFigures, VocabularyRule, choose_vocabulary


def prepare(recipe: Recipe, clock: StageClock | None = None) -> Prepared:
    """Open and check everything that a recipe names.

    Parameters
    ----------
    clock
        Shows how the texts are read for the vocabulary; other steps take no time.

    Raises
    ------
    InvalidInput
        If the checkpoint, the output, the device, the context, the networks, the budget or the task cannot be used.
    """
    source = builtin.path_or_id(recipe.model)
    checkpoint = open_any(source, trust_remote_code=recipe.trust_remote_code)
    if isinstance(checkpoint.family, MixtureFamily):
        return prepared_mixture(recipe, checkpoint)
    check_places(recipe, checkpoint.path, checkpoint.total_bytes)
    device = chosen_device(recipe.device)
    dtype = chosen_dtype(recipe.dtype, device, checkpoint.storage_dtype)
    prepared = prepared_for(recipe, checkpoint, device, dtype, clock=clock)
    if prepared.memory.streamed:
        check_tensors(checkpoint)
    else:
        checkpoint.load_model("meta", dtype)
    return prepared


def prepared_for(
    recipe: Recipe,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    memory: MemoryPlan | None = None,
    clock: StageClock | None = None,
) -> Prepared:
    """Check a recipe against an open checkpoint or the headers of a model in memory.

    Parameters
    ----------
    memory
        Where weights and activations are kept. Default: planned from the recipe.
    clock
        See :func:`prepare`.

    Raises
    ------
    InvalidInput
        If the context, a width, the networks, the budget or the task do not fit the model.
    """
    family = checkpoint.family
    if recipe.experts is not None:
        raise InvalidInput(
            f"experts = {recipe.experts}: {recipe.model} is no mixture of experts: leave it out"
        )
    context = chosen_context(recipe, family.context_length(checkpoint.config))
    widths = family.widths(checkpoint.config)
    layers = len(widths)
    # Ragged layers that are narrower than the multiple stay whole.
    width = max(widths) if recipe.layout == "ragged" else min(widths)
    multiple = recipe.width_multiple or min(default_multiple(max(widths)), width)
    if multiple > width:
        raise InvalidInput(
            f"width_multiple = {multiple}: a layer has only {width} neurons: lower it"
        )
    networks = networks_of(recipe, widths)
    if recipe.criterion == "membership-bias":
        require_bias(family, checkpoint.config)
    whole = whole_layers(recipe, layers)
    least = sum(one if layer in whole else min(one, multiple) for layer, one in enumerate(widths))
    head_groups = kept_head_groups(recipe, checkpoint)
    memory = memory or plan_memory(recipe, checkpoint, device, dtype, context)
    task = task_of(recipe)
    vocabulary = _vocabulary(recipe, checkpoint, task, clock or StageClock())
    kept = None if vocabulary is None else vocabulary[0]
    rest: tuple[int, ...] = ()
    if recipe.leaves_out_layers:
        require_depth(family, checkpoint.config)
    heads = _heads(recipe, checkpoint)
    if recipe.leaves_out_layers or heads is not None:
        each = ModelSize.of(checkpoint).neuron_parameters
        rest = other_parameters(checkpoint, head_groups, each)
        # One layer stays if layers can go, and all that the others have is room.
        stays = whole | {0} if recipe.leaves_out_layers else frozenset(range(layers))
        narrow = "neurons" in recipe.removable
        least = sum(
            min(widths[i], multiple) if narrow and i not in whole else widths[i] for i in stays
        )
        least -= sum(size for layer, size in enumerate(rest) if layer not in stays)
        if heads is not None:
            least -= sum(heads.most_saved(layer) for layer in stays - whole)
    budget = stated_budget(recipe, checkpoint, least, head_groups, kept)
    return Prepared(
        recipe,
        checkpoint,
        device,
        dtype,
        context,
        multiple,
        networks,
        budget,
        whole,
        memory,
        task,
        head_groups,
        None if recipe.forget is None else tuple(read_examples(recipe.forget)),
        vocabulary,
        rest,
        heads,
    )


def _heads(recipe: Recipe, checkpoint: Checkpoint) -> HeadLevels | None:
    """The numbers of attention heads that the search may choose; None if every layer keeps all of them.

    Raises
    ------
    InvalidInput
        They are to be chosen by name, not as part of `all`, and the architecture has no form for it.
    """
    if not recipe.removes_heads:
        return None
    try:
        require_attention(checkpoint.family, checkpoint.config)
    except InvalidInput:
        if recipe.structures.strip() == "all":
            return None
        raise
    return head_levels(recipe, checkpoint, ModelSize.of(checkpoint).neuron_parameters)


def require_layout(prepared: Prepared) -> None:
    """Refuse to make layers equally wide where that removes more than was asked for, or a share that is not yet known.

    Raises
    ------
    InvalidInput
        The model's layers differ in width, and an equal width for all does not reach the budget.
    """
    budget, widths, multiple = prepared.budget, prepared.widths, prepared.width_multiple
    if prepared.recipe.layout == "ragged" or len(set(widths)) == 1 or prepared.rest:
        return
    if prepared.recipe.forget is not None:
        raise InvalidInput(
            f"the layers have {min(widths)} to {max(widths)} neurons: forget from them with --layout ragged"
        )
    if budget is None:
        raise InvalidInput(
            f"the layers have {min(widths)} to {max(widths)} neurons, and only the run will tell how many the networks "
            "cover: use --layout ragged, or set the size (--sparsity)"
        )
    neurons = at_most(budget.neurons, len(widths), multiple) if budget.most else budget.neurons
    uniform_widths(neurons, widths, multiple)


def _vocabulary(
    recipe: Recipe, checkpoint: Checkpoint, task: Task | None, clock: StageClock
) -> tuple[VocabularyCut, VocabularyFigures] | None:
    """Choose the tokens that stay, from the texts and the task's examples; None if all stay."""
    if recipe.least_uses is None:
        return None
    rule = VocabularyRule(
        (*recipe.calibration, *recipe.vocabulary_texts, *recipe.recover_text),
        recipe.least_uses,
        recipe.vocabulary_chars,
        ascii=recipe.vocabulary_ascii,
    )
    more = () if task is None else [example.text for example in task.examples]
    with clock.stage("vocabulary"):
        return choose_vocabulary(checkpoint, rule, more=more)
