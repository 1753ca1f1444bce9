"""The dry run on a mixture of experts: sizes from the headers, memory as planned, and no time."""

from __future__ import annotations

import torch
from torch import nn

from fbn_prune.model.building import skeleton
from fbn_prune.model.mixture_family import MixtureFamily
from fbn_prune.pruning.allocation import budget_from_networks
from fbn_prune.runs.dry_run import MEMBERS_PER_NETWORK, Plan
from fbn_prune.runs.mixture_setup import plan_of
from fbn_prune.runs.opening import check_texts
from fbn_prune.runs.prepared import Prepared


def plan_mixture(prepared: Prepared) -> Plan:
    """Predict the size and memory of a prepared run without reading weights; the text is read as the run does."""
    check_texts(prepared)
    recipe, checkpoint, family = prepared.recipe, prepared.checkpoint, prepared.family
    assert isinstance(family, MixtureFamily)
    estimated, covered = ["peak_memory_bytes"], None
    if recipe.stated_budget is None:
        # As for other models: any K networks have about the same number of members.
        count = recipe.kept_networks_or_default
        covered = 1 - (1 - MEMBERS_PER_NETWORK) ** count
        if prepared.networks is not None:
            kept = range(min(count, len(prepared.networks.maps)))
            covered = budget_from_networks(prepared.networks, list(kept)) / prepared.neurons
        estimated += ["parameters_after", "bytes_after", "neurons_kept", "widths", "same_budget"]
    cut = plan_of(recipe, family, covered)
    after = family.with_experts(checkpoint.config, cut.experts, cut.width)
    before, left = (
        skeleton(config, family, torch.float32) for config in (checkpoint.config, after)
    )
    gone = _parameters(before) - _parameters(left)
    layers = len(family.mlp_layers)
    gone_bytes = gone * checkpoint.storage_dtype.itemsize
    return Plan(
        parameters_before=checkpoint.total_parameters,
        parameters_after=checkpoint.total_parameters - gone,
        bytes_before=checkpoint.total_bytes,
        bytes_after=checkpoint.total_bytes - gone_bytes,
        neurons_total=prepared.neurons,
        neurons_kept=cut.experts * cut.width * layers,
        heads_total=0,
        heads_kept=0,
        widths=[cut.width] * layers,
        same_budget={
            "sparsity": round(1 - cut.width / family.expert_width, 4),
            "experts": cut.experts,
        },
        peak_memory_bytes=prepared.memory.peak_bytes,
        memory=prepared.memory.words,
        seconds_low=None,
        seconds_high=None,
        estimated=estimated,
    )


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
