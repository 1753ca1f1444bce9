"""What a run will take and give, predicted from the checkpoint's headers alone: the dry run.

Counts are exact where the recipe fixes them. Two things are estimates and are said to be: how many neurons ten
networks cover before the networks are known, and time, from operation counts (:mod:`fbn_prune.runs.cost`) and rates measured
in less than a second (:mod:`fbn_prune.runs.rates`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from fbn_prune.distributed import processes
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.pruning.allocation import (
    at_most,
    budget_from_networks,
    narrowed,
    ranked_widths,
    uniform_widths,
)
from fbn_prune.pruning.layout import MOST_TRIED_EVERY, STRENGTHS, TRIAL_TOKENS
from fbn_prune.pruning.sensitivity import GRADIENT_TOKENS
from fbn_prune.runs.budget import Budget, ModelSize
from fbn_prune.runs.cost import (
    HeadWork,
    Job,
    ModelSizes,
    held_out_tokens,
    of_one_process,
    operations,
)
from fbn_prune.runs.rates import measured_rates, seconds, seconds_of_each
from fbn_prune.runs.setup import Prepared

MEMBERS_PER_NETWORK = 0.041
"""Share of all neurons that one network of 64 has as members on trained models; sets of K networks overlap as if
drawn independently, to within two points (17 % of the neurons for 5, 35 % for 10, 55 % for 20, 84 % for 40)."""


@dataclass(frozen=True)
class Plan:
    """Prediction of a run. Bytes, seconds; `estimated` names the fields that are no exact counts.

    `same_budget` says what the budget is in each of the other keys that could have set it; `stages` are the parts of
    `seconds`, by the names that the result gives them, `rest` what is in none.
    """

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    neurons_total: int
    neurons_kept: int
    heads_total: int
    heads_kept: int
    widths: list[int]
    same_budget: dict[str, float]
    peak_memory_bytes: int
    memory: str
    seconds: float
    stages: dict[str, float]
    estimated: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(prepared: Prepared) -> Plan:
    """Predict size, memory and time of a prepared run; reads no weights."""
    recipe, checkpoint = prepared.recipe, prepared.checkpoint
    total = prepared.width * prepared.layers
    estimated = ["peak_memory_bytes", "seconds"]
    sizes = ["parameters_after", "bytes_after", "neurons_kept", "widths", "same_budget"]
    if prepared.budget is not None:
        budget = prepared.budget
    elif prepared.networks is not None:
        # The order needs the weights; any K networks cover about as much as any others.
        kept = range(recipe.kept_networks_or_default)
        budget = Budget(budget_from_networks(prepared.networks, list(kept)), most=False)
        estimated += sizes
    else:
        # Fewer networks are each larger: the share that 64 leave untouched is spread over those there are.
        share = 1 - (1 - MEMBERS_PER_NETWORK) ** recipe.kept_networks_or_default
        budget = Budget(round(total * share), most=False)
        estimated += sizes
    widths = _widths(prepared, budget)
    if recipe.layout != "uniform":
        estimated.append("widths")
    size = ModelSize.of(checkpoint, prepared.head_groups)
    neurons = sum(widths)
    stages = predicted_seconds(prepared, neurons / prepared.layers)
    return Plan(
        parameters_before=checkpoint.total_parameters,
        parameters_after=size.parameters_with(neurons),
        bytes_before=checkpoint.total_bytes,
        bytes_after=size.bytes_with(neurons),
        neurons_total=total,
        neurons_kept=neurons,
        heads_total=prepared.heads_total,
        heads_kept=prepared.heads_kept,
        widths=widths,
        same_budget={
            "sparsity": round(1 - neurons / total, 4),
            "target_params": size.parameters_with(neurons),
            "target_size": size.bytes_with(neurons) + size.header_bytes,
        },
        peak_memory_bytes=prepared.memory.peak_bytes,
        memory=prepared.memory.words,
        seconds=sum(stages.values()),
        stages=stages,
        estimated=estimated,
    )


def _widths(prepared: Prepared, budget: Budget) -> list[int]:
    """Exact for uniform layers; otherwise an even split, which has the sum that the true widths will have."""
    recipe, multiple = prepared.recipe, prepared.width_multiple
    full = [prepared.width] * prepared.layers
    neurons = budget.neurons
    if recipe.layout == "ragged":
        even = [torch.arange(width, 0, -1) for width in full]
        widths = ranked_widths(even, neurons, multiple, prepared.whole)
        return narrowed(widths, neurons, multiple, prepared.whole) if budget.most else widths
    if budget.most:
        neurons = at_most(neurons, prepared.layers, multiple)
    return uniform_widths(neurons, full, multiple)


def predicted_seconds(prepared: Prepared, kept: float) -> dict[str, float]:
    """Seconds of each stage of a run that keeps `kept` neurons of a layer on average; for one of several processes."""
    counts = operations(model_sizes(prepared.checkpoint, prepared.dtype), job_of(prepared, kept))
    mine = of_one_process(
        counts, processes(), prepared.layers, sequential=prepared.recipe.sequential
    )
    each = seconds_of_each(measured_rates(prepared.device, prepared.dtype))
    return seconds(mine, each)


def model_sizes(checkpoint: Checkpoint, dtype: torch.dtype) -> ModelSizes:
    """A checkpoint's sizes, from its headers; `dtype` is what the model computes in."""
    family, config = checkpoint.family, checkpoint.config
    vocabulary, layers = family.vocab_size(config), family.num_layers(config)
    inner = (info for info in checkpoint.tensors.values() if info.shape[:1] != (vocabulary,))
    return ModelSizes(
        hidden=family.hidden_size(config),
        width=family.width(config),
        layers=layers,
        vocabulary=vocabulary,
        layer_parameters=sum(info.parameters for info in inner) // layers,
        parameters=checkpoint.total_parameters,
        nbytes=checkpoint.total_bytes,
        itemsize=dtype.itemsize,
    )


def job_of(prepared: Prepared, kept: float) -> Job:
    """The facts of a prepared recipe that decide its work."""
    recipe, memory = prepared.recipe, prepared.memory
    discovering = recipe.needs_networks and prepared.networks is None
    by_loss = recipe.layout != "uniform" and recipe.widths in ("loss", "auto")
    tried = recipe.layout == "auto" or (recipe.layout == "ragged" and recipe.widths != "members")
    rules = 2 if recipe.widths == "auto" else 1
    apart = max(2, min(MOST_TRIED_EVERY, recipe.tokens // TRIAL_TOKENS))
    known = recipe.networks if recipe.needs_networks else 0
    if prepared.networks is not None:
        known = len(prepared.networks.maps)
    return Job(
        tokens=recipe.tokens,
        held_out=held_out_tokens(recipe.tokens, recipe.held_out, prepared.context),
        context=prepared.context,
        batch_tokens=prepared.batch_tokens,
        kept=kept,
        networks=recipe.networks if discovering else 0,
        network_tokens=recipe.network_tokens,
        layerwise=recipe.scope == "layer",
        passes_for_ica=1 if memory.streamed or memory.keep_activations else 3,
        streamed=memory.streamed,
        second_order=recipe.criterion == "second-order",
        sequential=recipe.sequential,
        known_networks=known,
        knocked_out=known if recipe.rank_or_default == "knockout" else 0,
        matched=recipe.task is not None,
        gradient_tokens=min(recipe.tokens, GRADIENT_TOKENS) if recipe.needs_gradients else 0,
        width_passes=int(by_loss) + int(tried),
        trial_widths=1 + rules * len(STRENGTHS) if tried else 0,
        trial_tokens=recipe.tokens // apart,
        recovery_passes=recipe.recover_passes if recipe.recover else 0,
        heads=_head_work(prepared),
    )


def _head_work(prepared: Prepared) -> HeadWork | None:
    if prepared.head_groups is None:
        return None
    checkpoint, family = prepared.checkpoint, prepared.family
    shape = family.head_shape(checkpoint.config)
    whole = ModelSize.of(checkpoint).parameters
    gone = whole - ModelSize.of(checkpoint, prepared.head_groups).parameters
    removed = (shape.groups - prepared.head_groups) * prepared.layers
    return HeadWork(shape.groups, prepared.head_groups, shape.width, gone // removed)
