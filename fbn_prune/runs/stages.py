"""The stages of a run that several commands share: data, networks, their order, what the loss feels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fbn_prune.data.calibration import Batch, CalibrationData, TokenBlocks, calibration_data
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.networks.discovery import DiscoveryOptions, discover
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.networks.ranking import knockout_rise, output_energy, strongest_first
from fbn_prune.networks.task_matching import (
    MatchedCalibration,
    TaskCalibration,
    match_calibration,
    task_calibration,
)
from fbn_prune.progress import StageClock
from fbn_prune.pruning.second_order import loss_root
from fbn_prune.pruning.sensitivity import GRADIENT_TOKENS, output_sensitivity
from fbn_prune.runs.result import tool_version
from fbn_prune.runs.setup import Prepared
from fbn_prune.store import Work

KNOCKOUT_TOKENS = 8192
"""Calibration tokens on which knock-outs are measured: one pass a network must stay cheap."""


def load_calibration(prepared: Prepared, tokenizer: Any) -> CalibrationData:
    """The calibrating and the held-out blocks of a prepared run."""
    recipe = prepared.recipe
    return calibration_data(
        recipe.calibration,
        tokenizer,
        tokens=recipe.tokens,
        context=prepared.context,
        held_out=recipe.held_out,
        seed=recipe.seed,
        vocabulary=prepared.family.vocab_size(prepared.checkpoint.config),
    )


def find_networks(
    prepared: Prepared,
    adapter: ModelAdapter,
    tokenizer: Any,
    data: CalibrationData,
    clock: StageClock,
    *,
    recurrence: bool = False,
) -> FunctionalNetworks:
    """Discover the networks of a loaded model, with their output energy filled in."""
    recipe = prepared.recipe
    header = {
        "tool": f"fbn-prune {tool_version()}",
        "torch": torch.__version__,
        "model": recipe.model,
        "model_type": prepared.checkpoint.config.get("model_type"),
        "calibration": list(recipe.calibration),
        "calibration_fingerprint": data.calibrating.fingerprint,
        "dtype": str(prepared.dtype).removeprefix("torch."),
    }
    options = DiscoveryOptions(
        recipe.networks, recipe.network_tokens, recipe.scope, recipe.seed, recurrence
    )
    networks = discover(
        adapter,
        data.calibrating,
        options,
        tokenizer=tokenizer,
        batch_tokens=prepared.batch_tokens,
        keep=prepared.memory.keep_activations,
        header=header,
        clock=clock,
    )
    return replace(networks, energy=output_energy(networks, adapter.down_weights()))


def load_task(prepared: Prepared, tokenizer: Any, data: CalibrationData) -> TaskCalibration | None:
    """The task's blocks beside the generic data, without its test questions; None without a task."""
    if prepared.task is None:
        return None
    return task_calibration(
        prepared.task,
        data,
        tokenizer,
        context=prepared.context,
        vocabulary=prepared.family.vocab_size(prepared.checkpoint.config),
    )


def match_to_task(
    prepared: Prepared,
    adapter: ModelAdapter,
    networks: FunctionalNetworks | None,
    task: TaskCalibration,
    clock: StageClock,
    work: Work | None = None,
) -> MatchedCalibration:
    """Weigh the generic data by the networks that the recipe keeps."""
    assert networks is not None
    kept = work or Work(None)

    def keep(compute: Callable[[], Tensor]) -> Tensor:
        return kept.tensors("activity", lambda: {"activity": compute().cpu()})["activity"]

    return match_calibration(
        adapter,
        networks,
        task.data.calibrating,
        task.examples,
        matched_on=prepared.recipe.kept_networks_or_default,
        batch_tokens=prepared.batch_tokens,
        clock=clock,
        keep=keep,
    )


def rank_scores(
    prepared: Prepared,
    adapter: ModelAdapter,
    networks: FunctionalNetworks,
    data: CalibrationData,
    matched: MatchedCalibration | None,
    clock: StageClock,
) -> Tensor:
    """What the recipe's `rank` orders networks by, float64 [networks]: energy, nats, or standard deviations."""
    rank = prepared.recipe.rank_or_default
    if rank == "task":
        assert matched is not None
        return matched.match.vector.abs()
    if rank == "energy":
        # Networks from a file may have been found on another model, whose weights gave them another energy.
        if prepared.networks is None and networks.energy is not None:
            return networks.energy
        return output_energy(networks, adapter.down_weights())
    few: list[Batch] = []
    for batch in data.calibrating.batches(prepared.batch_tokens):
        if sum(other.tokens for other in few) < KNOCKOUT_TOKENS:
            few.append(batch)
    return knockout_rise(adapter, networks, few, clock)


def rank_networks(
    prepared: Prepared,
    adapter: ModelAdapter,
    networks: FunctionalNetworks | None,
    data: CalibrationData,
    matched: MatchedCalibration | None,
    clock: StageClock,
) -> list[int]:
    """Networks, strongest first; empty without networks."""
    if networks is None:
        return []
    return strongest_first(rank_scores(prepared, adapter, networks, data, matched, clock))


def recover_model(
    prepared: Prepared, adapter: ModelAdapter, blocks: TokenBlocks, work: Work, clock: StageClock
) -> dict[str, Tensor]:
    """Train the cut model in place towards the dense one; its new weights by their names in the checkpoint."""
    from fbn_prune.pruning.recovery.healing import (  # peft is slow
        RecoveryOptions,
        heal,
        healed_tensors,
    )

    recipe = prepared.recipe
    with clock.stage("load"):
        dense = prepared.load_model()
    options = RecoveryOptions(recipe.recover_passes, recipe.recover_rank, recipe.seed)
    heal(adapter, dense, blocks, options, clock, store=work)
    return healed_tensors(adapter, prepared.checkpoint)


def loss_roots_of(
    prepared: Prepared, adapter: ModelAdapter, blocks: TokenBlocks, clock: StageClock
) -> list[Tensor] | None:
    """R of each layer, where errors are to be scored as the loss feels them."""
    if not prepared.recipe.needs_gradients:
        return None
    batches = blocks.subset(GRADIENT_TOKENS).batches(prepared.batch_tokens // 4)
    return [
        loss_root(sensitivity)
        for sensitivity in output_sensitivity(adapter, batches, clock)
    ]
