"""What a run will take and give, predicted from the checkpoint's headers alone: the dry run.

Counts are exact where the recipe fixes them. Two things are estimates and are said to be: how many neurons ten
networks cover before the networks are known, and time, from operation counts and a rate measured in half a second.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fbn_prune.job import Prepared, memory_for_activations
from fbn_prune.pruning.allocation import (
    budget_from_networks,
    budget_from_sparsity,
    uniform_widths,
)

MEMBERS_PER_NETWORK = 0.041
"""Share of all neurons that one network of 64 has as members on trained models; sets of K networks overlap as if
drawn independently, to within two points (17 % of the neurons for 5, 35 % for 10, 55 % for 20, 84 % for 40)."""

PROCESS_BYTES = 450 * 2**20
"""Python, torch and transformers, before any model."""


@dataclass(frozen=True)
class Plan:
    """Prediction of a run. Bytes, seconds; `estimated` names the fields that are no exact counts."""

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    neurons_total: int
    neurons_kept: int
    widths: list[int]
    peak_memory_bytes: int
    seconds: float
    estimated: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(prepared: Prepared) -> Plan:
    """Predict size, memory and time of a prepared run; reads no weights."""
    recipe, checkpoint = prepared.recipe, prepared.checkpoint
    total = prepared.width * prepared.layers
    estimated = ["peak_memory_bytes", "seconds"]
    if recipe.sparsity is not None:
        budget = budget_from_sparsity(total, recipe.sparsity)
    elif prepared.networks is not None:
        # The order needs the weights; any K networks cover about as much as any others.
        kept = range(recipe.kept_networks_or_default)
        budget = budget_from_networks(prepared.networks, list(kept))
        estimated += ["parameters_after", "bytes_after", "neurons_kept", "widths"]
    else:
        # Fewer networks are each larger: the share that 64 leave untouched is spread over those there are.
        share = 1 - (1 - MEMBERS_PER_NETWORK) ** recipe.kept_networks_or_default
        budget = round(total * share)
        estimated += ["parameters_after", "bytes_after", "neurons_kept", "widths"]
    full = [prepared.width] * prepared.layers
    widths = uniform_widths(budget, full, prepared.width_multiple)
    removed = sum(full) - sum(widths)
    per_neuron = _weights_per_neuron(prepared)
    return Plan(
        parameters_before=checkpoint.total_parameters,
        parameters_after=checkpoint.total_parameters - removed * per_neuron,
        bytes_before=checkpoint.total_bytes,
        bytes_after=checkpoint.total_bytes
        - removed * per_neuron * checkpoint.storage_dtype.itemsize,
        neurons_total=total,
        neurons_kept=sum(widths),
        widths=widths,
        peak_memory_bytes=_peak_bytes(prepared),
        seconds=_operations(prepared) / _operations_per_second(prepared.device),
        estimated=estimated,
    )


def _weights_per_neuron(prepared: Prepared) -> int:
    """Stored numbers that go with one neuron: its rows, its column, its biases."""
    family, config = prepared.family, prepared.checkpoint.config
    stacks = sum(projection.stacked for projection in family.inputs)
    biases = stacks if family.has_bias(config) else 0
    return (stacks + 1) * family.hidden_size(config) + biases


def _peak_bytes(prepared: Prepared) -> int:
    recipe, family, config = prepared.recipe, prepared.family, prepared.checkpoint.config
    width, hidden = prepared.width, family.hidden_size(config)
    model = prepared.checkpoint.total_parameters * prepared.dtype.itemsize
    logits = 3 * 4 * min(recipe.tokens, prepared.batch_tokens) * family.vocab_size(config)
    hidden_states = recipe.tokens * hidden * prepared.dtype.itemsize
    second_order = width * width * (4 + 5 * 8) + 6 * prepared.batch_tokens * width * 4
    tokens = min(recipe.network_tokens, recipe.tokens)
    activations = 4 * tokens * width * prepared.layers
    kept = activations if activations <= memory_for_activations() else 4 * tokens * width
    solver = kept + 4 * tokens * tokens * 2 + 8 * recipe.networks * width * prepared.layers * 4
    stages = [logits, hidden_states + second_order, solver if recipe.needs_networks else 0]
    return PROCESS_BYTES + model + max(stages)


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
