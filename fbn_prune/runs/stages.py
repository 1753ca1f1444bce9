"""Stages that several commands share: discovery, task matching, ranking, recovery, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fbn_prune.data.calibration import Batch, TokenBlocks
from fbn_prune.errors import InvalidInput, counted
from fbn_prune.export.published import public_name
from fbn_prune.model.mixture_family import MixtureFamily
from fbn_prune.model.non_finite import damage
from fbn_prune.model.perplexity import NonFiniteLogits, exp_or_infinite
from fbn_prune.networks.discovery import DiscoveryOptions, discover
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.networks.ranking import knockout_rise, output_energy, strongest_first
from fbn_prune.networks.task_matching import MatchedCalibration, match_calibration
from fbn_prune.pruning.second_order import loss_root
from fbn_prune.pruning.sensitivity import GRADIENT_TOKENS, output_sensitivity
from fbn_prune.runs.kept import tensors
from fbn_prune.runs.opening import OpenRun
from fbn_prune.runs.result import tool_version
from fbn_prune.store import Store

GUESSING = 0.8
"""Share of the vocabulary's size from which on a perplexity is called no better than guessing."""

KNOCKOUT_TOKENS = 8192
"""Calibration tokens for knock-outs; few, because each network takes a pass over them."""


def find_networks(run: OpenRun, *, recurrence: bool = False) -> FunctionalNetworks:
    """Discover the networks of the run's model and compute their output energy; with `recurrence`, measure that too."""
    prepared, adapter = run.prepared, run.adapter
    recipe = prepared.recipe
    header = {
        "tool": f"fbn-prune {tool_version()}",
        "torch": torch.__version__,
        "model": public_name(recipe.model),
        "model_type": prepared.checkpoint.config.get("model_type"),
        "calibration": list(map(public_name, recipe.calibration)),
        "calibration_fingerprint": run.data.calibrating.fingerprint,
        "dtype": str(prepared.dtype).removeprefix("torch."),
    }
    if isinstance(prepared.family, MixtureFamily):
        header["experts"] = prepared.family.count
    options = DiscoveryOptions(
        recipe.networks, recipe.network_tokens, recipe.scope, recipe.seed, recurrence
    )
    with measuring_dense(run, run.data.calibrating.batches(prepared.batch_tokens)):
        networks = discover(
            adapter,
            run.data.calibrating,
            options,
            tokenizer=run.tokenizer,
            batch_tokens=prepared.batch_tokens,
            keep=prepared.memory.keep_activations,
            header=header,
            clock=run.clock,
            on_dense=lambda loss: refuse_guessing(run, exp_or_infinite(loss)),
        )
    return replace(networks, energy=output_energy(networks, adapter.down_weights()))


def match_to_task(
    run: OpenRun, networks: FunctionalNetworks | None, store: Store
) -> MatchedCalibration | None:
    """Return the calibration text weighted by its similarity to the task; None without a task."""
    prepared, task = run.prepared, run.task
    if task is None:
        return None
    assert networks is not None

    def keep(compute: Callable[[], Tensor]) -> Tensor:
        return tensors(store, "activity", lambda: {"activity": compute().cpu()})["activity"]

    return match_calibration(
        run.adapter,
        networks,
        task.data.calibrating,
        task.examples,
        matched_on=prepared.recipe.task_networks_or_default,
        batch_tokens=prepared.batch_tokens,
        clock=run.clock,
        keep=keep,
    )


def rank_scores(
    run: OpenRun, networks: FunctionalNetworks, matched: MatchedCalibration | None
) -> Tensor:
    """Return the score of each network by the recipe's `rank`, float64 [networks].

    The unit is output energy ("energy"), nats of loss ("knockout") or standard deviations ("task").
    """
    prepared, adapter = run.prepared, run.adapter
    rank = prepared.recipe.rank_or_default
    if rank == "task":
        assert matched is not None
        return matched.match.vector.abs()
    if rank == "energy":
        # The energy in a file may come from another model's weights.
        if prepared.networks is None and networks.energy is not None:
            return networks.energy
        return output_energy(networks, adapter.down_weights())
    few: list[Batch] = []
    for batch in run.data.calibrating.batches(prepared.batch_tokens):
        if sum(other.tokens for other in few) < KNOCKOUT_TOKENS:
            few.append(batch)
    with measuring_dense(run, few):
        return knockout_rise(
            adapter,
            networks,
            few,
            run.clock,
            on_dense=lambda loss: refuse_guessing(run, exp_or_infinite(loss)),
        )


def rank_networks(
    run: OpenRun, networks: FunctionalNetworks | None, matched: MatchedCalibration | None
) -> list[int]:
    """Return the indices of the networks, strongest first; an empty list without networks."""
    if networks is None:
        return []
    return strongest_first(rank_scores(run, networks, matched))


@contextmanager
def measuring_dense(run: OpenRun, batches: Sequence[Batch]) -> Iterator[None]:
    """Turn NaN or Inf in the unpruned model's logits into a refusal that names the first layer that computes them.

    Raises
    ------
    InvalidInput
        A logit of the model on these batches is NaN or Inf.
    """
    try:
        yield
    except NonFiniteLogits:
        raise damage(run.adapter, batches) from None


def no_better_than_guessing(perplexity: float, vocabulary: int) -> bool:
    """Whether a perplexity is near the vocabulary's size, or above it."""
    return not perplexity < GUESSING * vocabulary


def refuse_guessing(run: OpenRun, perplexity: float) -> None:
    """Refuse a dense model that predicts no better than a uniform guess, unless the recipe allows it.

    Raises
    ------
    InvalidInput
        The perplexity is near the vocabulary's size, or above it.
    """
    vocabulary = run.prepared.family.vocab_size(run.prepared.checkpoint.config)
    if not no_better_than_guessing(perplexity, vocabulary) or run.prepared.recipe.allow_untrained:
        return
    raise InvalidInput(
        f"{run.prepared.recipe.model}: the unpruned model's perplexity is {perplexity:,.0f} with a vocabulary of "
        f"{vocabulary:,} tokens, no better than guessing. Most likely its tokenizer ({type(run.tokenizer).__name__}) "
        "is not the one that it was trained with; or the text is of a kind that it does not know. "
        "allow_untrained (--allow-untrained) goes on all the same"
    )


@dataclass(frozen=True)
class Recovered:
    """What a recovery ended in.

    Attributes
    ----------
    trained
        The trained weights by their names in the checkpoint; None if one of them is not finite.
    restore
        Puts the cut model's weights back.
    warnings, curve
        See :class:`fbn_prune.pruning.recovery.healing.Healed`.
    passes, tokens
        Passes over how many tokens each step took.
    """

    trained: dict[str, Tensor] | None
    restore: Callable[[], None]
    warnings: list[str]
    curve: list[tuple[int, float]]
    passes: int
    tokens: int


def recovery_text(run: OpenRun, blocks: TokenBlocks) -> TokenBlocks:
    """Return the text that all trainings of a recovery share: the recipe's own, or else `blocks`.

    Raises
    ------
    InvalidInput
        It has fewer blocks than there are trainings.
    """
    recipe = run.prepared.recipe
    found = blocks if run.training is None else run.training
    if recipe.recover_tokens is not None:
        found = found.subset(recipe.recover_tokens)
    if len(found.blocks) < recipe.recover_cuts:
        only = counted(len(found.blocks), "block")
        raise InvalidInput(
            f"recover_cuts = {recipe.recover_cuts}: the text to recover on has only {only}, and each training needs "
            "its own: give more text, or cut in fewer steps"
        )
    return found


def recover_model(run: OpenRun, blocks: TokenBlocks, store: Store, part: int = 0) -> Recovered:
    """Train the cut model in place to match the dense one, on `blocks` unless the recipe names another text.

    Of a text that several trainings share, `part` says whose turn it is, from 0.
    """
    from fbn_prune.pruning.recovery.healing import (  # peft is slow
        RecoveryOptions,
        heal,
        healed_tensors,
        kept_weights,
    )

    prepared, adapter = run.prepared, run.adapter
    recipe = prepared.recipe
    with run.clock.stage("load"):
        dense = run.dense or prepared.load_model()
    blocks = recovery_text(run, blocks)
    passes = recipe.recover_passes_or_default
    if (tokens := recipe.recover_tokens) is not None:
        passes = max(1, round(tokens / blocks.tokens))
    blocks = blocks.chosen(range(part, len(blocks.blocks), recipe.recover_cuts))
    options = RecoveryOptions(
        passes=passes,
        rank=recipe.recover_rank_or_default,
        seed=recipe.seed,
        steps=recipe.recover_steps_in_order,
        minutes=recipe.recover_minutes,
        text_loss=recipe.recover_text_loss,
        weights=recipe.recover_weights,
        recompute=prepared.memory.recompute,
    )
    restore = kept_weights(adapter, prepared.memory.scratch)
    healed = heal(adapter, dense, blocks, options, run.clock, store=store)
    trained = healed_tensors(adapter, prepared.checkpoint)
    return Recovered(trained, restore, healed.warnings, healed.curve, passes, blocks.tokens)


def loss_roots_of(run: OpenRun, blocks: TokenBlocks, store: Store) -> list[Tensor] | None:
    """Return the loss root R of each layer (F = RᵀR of the output gradients), or None if no gradients are needed."""
    prepared, adapter = run.prepared, run.adapter
    if not prepared.recipe.needs_gradients:
        return None

    def compute() -> dict[str, Tensor]:
        batches = blocks.subset(GRADIENT_TOKENS).batches(prepared.batch_tokens // 4)
        sensitivities = output_sensitivity(adapter, batches, run.clock)
        return {f"{layer:05d}": loss_root(one) for layer, one in enumerate(sensitivities)}

    roots = tensors(store, "loss-roots", compute)
    return [roots[name].to(adapter.layer_device(layer)) for layer, name in enumerate(sorted(roots))]
