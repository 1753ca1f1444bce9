"""What a run will take and give, predicted from the checkpoint's headers alone: the dry run.

Counts are exact where the recipe fixes them. Two things are estimates and are said to be: how many neurons ten
networks cover before the networks are known, and time, from operation counts and a rate measured in half a second.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fbn_prune.budget import Budget, ModelSize
from fbn_prune.prepared import Prepared
from fbn_prune.pruning.allocation import (
    at_most,
    budget_from_networks,
    narrowed,
    ranked_widths,
    uniform_widths,
)
from fbn_prune.sensitivity import GRADIENT_TOKENS

MEMBERS_PER_NETWORK = 0.041
"""Share of all neurons that one network of 64 has as members on trained models; sets of K networks overlap as if
drawn independently, to within two points (17 % of the neurons for 5, 35 % for 10, 55 % for 20, 84 % for 40)."""


@dataclass(frozen=True)
class Plan:
    """Prediction of a run. Bytes, seconds; `estimated` names the fields that are no exact counts.

    `same_budget` says what the budget is in each of the other keys that could have set it.
    """

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    neurons_total: int
    neurons_kept: int
    widths: list[int]
    same_budget: dict[str, float]
    peak_memory_bytes: int
    memory: str
    seconds: float
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
    return Plan(
        parameters_before=checkpoint.total_parameters,
        parameters_after=size.parameters_with(neurons),
        bytes_before=checkpoint.total_bytes,
        bytes_after=size.bytes_with(neurons),
        neurons_total=total,
        neurons_kept=neurons,
        widths=widths,
        same_budget={
            "sparsity": round(1 - neurons / total, 4),
            "target_params": size.parameters_with(neurons),
            "target_size": size.bytes_with(neurons) + size.header_bytes,
        },
        peak_memory_bytes=prepared.memory.peak_bytes,
        memory=prepared.memory.words,
        seconds=_operations(prepared) / _operations_per_second(prepared.device),
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


def _operations(prepared: Prepared) -> float:
    recipe, family, config = prepared.recipe, prepared.family, prepared.checkpoint.config
    tokens, width, layers = recipe.tokens, prepared.width, prepared.layers
    forward = 2.0 * prepared.checkpoint.total_parameters
    work = tokens * (forward * (3 if recipe.sequential else 1) + layers * width * width)
    work += 2 * recipe.held_out * tokens * forward
    work += layers * 6.0 * width**3
    if recipe.needs_networks:
        sample = min(recipe.network_tokens, tokens)
        work += sample * forward + sample * sample * width * layers
        work += 2.0 * sample * sample * 2000 + 400 * 4.0 * width * layers * recipe.networks**2
    if recipe.recover:  # forward and backward in each step, beside the dense model
        work += 8 * forward * tokens * recipe.recover_passes
    if recipe.needs_gradients:
        work += 3 * forward * min(tokens, GRADIENT_TOKENS)
    if recipe.layout != "uniform" and recipe.widths in ("loss", "auto"):
        work += tokens * (forward + layers * width * width) + layers * 6.0 * width**3
    if recipe.layout == "auto" or (recipe.layout == "ragged" and recipe.widths == "auto"):
        work += tokens * (forward + layers * width * width) + 3 * layers * 6.0 * width**3
    if recipe.needs_networks and recipe.rank_or_default == "knockout":
        work += recipe.networks * min(tokens, 8192) * forward
    return work + tokens * family.hidden_size(config)


def _operations_per_second(device: torch.device) -> float:
    """Rate of a float32 matrix product here, at the share of it that whole models reach."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device)
    (a @ a).sum().item()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.5:
        (a @ a).sum().item()
        count += 1
    return 0.5 * count * 2.0 * size**3 / (time.perf_counter() - start)
