"""The main job, from a recipe to a smaller checkpoint: calibrate, discover, rank, prune, measure, export.

Everything that can be refused is refused in :func:`fbn_prune.runs.setup.prepare`, before any work; nothing appears at
the output path until all of it is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch, CalibrationData, TokenBlocks
from fbn_prune.distributed import is_first
from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.export.directory import check_room
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.non_finite import damage
from fbn_prune.model.perplexity import NonFiniteLogits, perplexity
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.networks.task_matching import MatchedCalibration, TaskCalibration
from fbn_prune.progress import StageClock
from fbn_prune.pruning.allocation import budget_from_networks, member_scores
from fbn_prune.pruning.cutting import CutPlan, cut_layers
from fbn_prune.pruning.evidence import CutOptions
from fbn_prune.pruning.layout import (
    UNIFORM,
    Layout,
    LayoutRequest,
    Subject,
    choose_layout,
    trial_bytes,
)
from fbn_prune.pruning.prediction import check_rise, predicted_rise
from fbn_prune.pruning.recovery.gain import Recovery
from fbn_prune.recipe import Recipe
from fbn_prune.runs.budget import Budget
from fbn_prune.runs.output import publish
from fbn_prune.runs.result import PruneResult, peak_memory_bytes
from fbn_prune.runs.resume import work_of
from fbn_prune.runs.setup import Prepared, prepare
from fbn_prune.runs.stages import (
    find_networks,
    load_calibration,
    load_task,
    loss_roots_of,
    match_to_task,
    rank_networks,
    recover_model,
)
from fbn_prune.store import Work


def run_prune(recipe: Recipe, clock: StageClock) -> PruneResult:
    """The main job.

    Parameters
    ----------
    recipe
        With `output` None everything but the export is done.

    Raises
    ------
    InvalidInput
        See :func:`prepare` and :func:`fbn_prune.data.calibration.calibration_data`.
    FbnPruneError
        The pruned model does not work, or its checkpoint does not fit its config.
    """
    prepared = prepare(recipe)
    with distributed.joined(prepared.device), work_of(prepared) as work:
        return _pruned(prepared, work, clock)


def _pruned(prepared: Prepared, work: Work, clock: StageClock) -> PruneResult:
    """The stages of the main job; those finished before are not done again."""
    recipe, family = prepared.recipe, prepared.family
    tokenizer = prepared.checkpoint.load_tokenizer()
    with clock.stage("calibration"):
        data = load_calibration(prepared, tokenizer)
        task = load_task(prepared, tokenizer, data)
        data = data if task is None else task.data
        held_out = data.held_out.batches(prepared.batch_tokens)
    if work.bind(_fingerprint(data, task)):
        clock.note("the calibration text has changed: all stages are done anew")
    if work.started:
        clock.note(f"going on from {work.words}")
    with clock.stage("load"):
        adapter = prepared.load_model()
    before = work.numbers("dense", lambda: _dense_perplexity(adapter, held_out, clock))
    on_task = work.numbers("dense-task", lambda: _test_perplexity(prepared, adapter, task, clock))
    networks = prepared.networks
    if networks is None and recipe.needs_networks:
        networks = work.networks(lambda: find_networks(prepared, adapter, tokenizer, data, clock))
    matched = None
    if task is not None:
        matched = match_to_task(prepared, adapter, networks, task, clock, work)
    blocks = data.calibrating if matched is None else matched.blocks
    calibrating = blocks.batches(prepared.batch_tokens)
    order = work.numbers(
        "ranking", lambda: rank_networks(prepared, adapter, networks, data, matched, clock)
    )
    kept = _kept_networks(recipe, order)
    options = CutOptions(
        sequential=recipe.sequential,
        damping=recipe.damping,
        refit_damping=recipe.refit_damping,
        seed=recipe.seed,
        round_to=prepared.checkpoint.storage_dtype,
        loss_aware=recipe.loss_aware,
        head_groups=prepared.head_groups,
    )
    loss_roots = _kept_loss_roots(prepared, adapter, blocks, work, clock)
    subject = Subject(
        adapter,
        blocks,
        prepared.batch_tokens,
        recipe.criterion,
        options,
        networks,
        kept,
        loss_roots,
        prepared.memory.scratch,
    )
    request = _layout_request(prepared, networks, kept)
    layout = Layout(
        **work.numbers("layout", lambda: asdict(_chosen_layout(prepared, subject, request, clock)))
    )
    if recipe.layout == "auto":
        clock.note(_verdict(layout))
    widths = layout.widths
    members = None if networks is None else member_scores(networks, kept)
    cut = cut_layers(
        adapter,
        calibrating,
        CutPlan(recipe.criterion, widths, members),
        options,
        loss_roots=loss_roots if recipe.loss_aware else None,
        clock=clock,
        store=work,
    )
    after = work.numbers("pruned", lambda: _pruned_perplexity(adapter, held_out, clock))
    predicted = predicted_rise(cut.relative_errors)
    warning = check_rise(before, after, predicted, family.vocab_size(prepared.checkpoint.config))
    if warning is not None:
        clock.note(f"warning: {warning}")
    # Said when the checkpoint was opened; who gets the result has not heard it.
    noted = [line for line in (prepared.checkpoint.oddities(), warning) if line is not None]
    recovery = None
    if recipe.recover:
        cut = replace(cut, trained=recover_model(prepared, adapter, blocks, work, clock))
        healed = work.numbers("recovered", lambda: _pruned_perplexity(adapter, held_out, clock))
        recovery = Recovery.measured(before, after, healed, recipe.recover_passes, blocks.tokens)
        after = healed
    result = PruneResult(
        model=recipe.model,
        output=None if recipe.output is None else str(recipe.output),
        criterion=recipe.criterion,
        parameters_before=prepared.checkpoint.total_parameters,
        parameters_after=prepared.checkpoint.total_parameters,
        bytes_before=prepared.checkpoint.total_bytes,
        bytes_after=prepared.checkpoint.total_bytes,
        perplexity_before=before,
        perplexity_after=after,
        perplexity_expected=predicted.perplexity(before),
        warning="; ".join(noted) or None,
        neurons_kept=sum(widths),
        neurons_total=prepared.width * prepared.layers,
        heads_kept=prepared.heads_kept,
        heads_total=prepared.heads_total,
        widths=widths,
        width_rule=layout.rule,
        layout_trials=layout.trials,
        kept_networks=kept,
        ranked_networks=order,
        calibration_tokens=blocks.tokens,
        held_out_tokens=data.held_out.tokens,
        calibration_fingerprint=blocks.fingerprint,
        task=None if task is None or matched is None else _task_facts(task, matched),
        forward_seconds=cut.forward_seconds,
        peak_memory_bytes=0,
        recovery=recovery,
    )
    if result.task is not None and on_task is not None:
        result.task |= {
            "test_perplexity_before": on_task,
            "test_perplexity_after": work.numbers(
                "pruned-task", lambda: _test_perplexity(prepared, adapter, task, clock)
            ),
        }
    if recipe.output is not None and is_first():
        publish(prepared, cut, networks, result, clock, shards=work)
    result.stages = dict(clock.seconds)
    result.peak_memory_bytes = peak_memory_bytes()
    return result


def _perplexity(
    adapter: ModelAdapter, batches: Sequence[Batch], clock: StageClock, stage: str
) -> float:
    with clock.stage(stage, sum(batch.tokens for batch in batches), "tokens") as advance:
        return perplexity(adapter, batches, advance)


def _dense_perplexity(
    adapter: ModelAdapter, batches: Sequence[Batch], clock: StageClock
) -> float:
    try:
        return _perplexity(adapter, batches, clock, "dense perplexity")
    except NonFiniteLogits:
        raise damage(adapter, batches) from None


def _pruned_perplexity(
    adapter: ModelAdapter, batches: Sequence[Batch], clock: StageClock
) -> float:
    remedy = "nothing was written; keep more neurons, raise --tokens, or compute in --dtype float32"
    try:
        after = _perplexity(adapter, batches, clock, "pruned perplexity")
    except NonFiniteLogits:
        raise FbnPruneError(f"the pruned model gives NaN or Inf: {remedy}") from None
    if not math.isfinite(after):
        raise FbnPruneError(f"the pruned model's perplexity is {after}: {remedy}")
    return after


def _test_perplexity(
    prepared: Prepared, adapter: ModelAdapter, task: TaskCalibration | None, clock: StageClock
) -> float | None:
    if task is None or task.test is None:
        return None
    return _perplexity(adapter, task.test.batches(prepared.batch_tokens), clock, "task perplexity")


def _fingerprint(data: CalibrationData, task: TaskCalibration | None) -> str:
    """Of all text that a run reads: what calibrates, what is held out, the task's examples and its test."""
    blocks = [data.calibrating, data.held_out]
    if task is not None:
        blocks += [task.examples] if task.test is None else [task.examples, task.test]
    return " ".join(each.fingerprint for each in blocks)


def _kept_loss_roots(
    prepared: Prepared, adapter: ModelAdapter, blocks: TokenBlocks, work: Work, clock: StageClock
) -> list[Tensor] | None:
    if not prepared.recipe.needs_gradients:
        return None

    def compute() -> dict[str, Tensor]:
        roots = loss_roots_of(prepared, adapter, blocks, clock)
        assert roots is not None
        return {f"{layer:05d}": root for layer, root in enumerate(roots)}

    kept = work.tensors("loss-roots", compute)
    return [
        kept[name].to(adapter.layer_device(layer))
        for layer, name in enumerate(sorted(kept))
    ]


def _task_facts(task: TaskCalibration, matched: MatchedCalibration) -> dict[str, Any]:
    return {
        "file": task.task.source,
        "examples": len(task.task.examples),
        "tokens": task.examples.tokens,
        "matched_networks": matched.match.networks,
        "effective_documents": matched.effective_documents,
        "documents": len(matched.match.weights),
        "left_out": task.left_out,
        "passed_over": task.task.passed_over,
        "test_questions": len(task.task.test),
    }


def _kept_networks(recipe: Recipe, order: list[int]) -> list[int]:
    """The networks to keep: as many as named; where the budget is stated without a number of them, all."""
    if recipe.stated_budget is not None and recipe.keep_networks is None:
        return order
    if order and recipe.kept_networks_or_default > len(order):
        raise InvalidInput(
            f"keep_networks = {recipe.kept_networks_or_default}: only {len(order)} networks found"
        )
    return order[: recipe.kept_networks_or_default]


def _layout_request(
    prepared: Prepared, networks: FunctionalNetworks | None, kept: Sequence[int]
) -> LayoutRequest:
    recipe, budget = prepared.recipe, prepared.budget
    if budget is None:
        assert networks is not None
        budget = Budget(budget_from_networks(networks, kept), most=False)
    return LayoutRequest(
        layout=recipe.layout,
        rule=recipe.widths,
        budget=budget.neurons,
        most=budget.most,
        full=(prepared.width,) * prepared.layers,
        multiple=prepared.width_multiple,
        whole=prepared.whole,
    )


def _chosen_layout(
    prepared: Prepared, subject: Subject, request: LayoutRequest, clock: StageClock
) -> Layout:
    hidden = prepared.family.hidden_size(prepared.checkpoint.config)
    tried = trial_bytes(request, hidden, prepared.dtype.itemsize)
    check_room(subject.scratch, tried, "folder of temporary files")
    return choose_layout(subject, request, clock)


def _verdict(layout: Layout) -> str:
    """What a trial of layouts found, in a sentence: what ragged gains, and what it costs."""
    ragged = min(rise for rule, rise in layout.trials.items() if rule != UNIFORM)
    uniform = layout.trials[UNIFORM]
    gain = 1 - ragged / uniform if uniform > 0 else 0.0
    taken = "uniform" if layout.rule == UNIFORM else f"ragged (widths by {layout.rule})"
    return (
        f"layers of different widths would save {gain:.0%} of the loss rise on calibration text set aside "
        f"({uniform:.3f} nats with uniform widths, {ragged:.3f} ragged) and would load with trust_remote_code only: "
        f"taken: {taken}"
    )
