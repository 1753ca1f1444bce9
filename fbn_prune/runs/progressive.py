"""Progressive pruning: cut a model in steps, with training between them (arXiv 2502.03460).

Each step removes the same share of what the last cut is to remove, and has its own part of the text to recover on. The
last step's training is the run's own recovery.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fbn_prune.errors import FbnPruneError
from fbn_prune.model.surgery import MlpCut
from fbn_prune.pruning.cutting import CutModel, CutPlan, cut_layers
from fbn_prune.pruning.layout import Subject
from fbn_prune.runs.kept import Part
from fbn_prune.runs.opening import OpenRun
from fbn_prune.runs.stages import recover_model
from fbn_prune.store import Store


def cut_in_steps(run: OpenRun, subject: Subject, plan: CutPlan, store: Store) -> CutModel:
    """Cut the model in place to the widths of `plan`, and train it after each step but the last.

    Returns
    -------
    CutModel
        The cuts of all steps in one; `trained` holds the linear maps as they are.

    Raises
    ------
    FbnPruneError
        A trained weight is not finite in the checkpoint's dtype.
    """
    from fbn_prune.pruning.recovery.healing import healed_tensors  # peft is slow

    adapter, count = run.adapter, run.prepared.recipe.recover_cuts
    batches = subject.blocks.batches(subject.batch_tokens)
    roots = subject.loss_roots if subject.options.loss_aware else None
    whole = adapter.widths
    cuts: list[MlpCut] = []
    errors = [0.0] * len(whole)
    seconds = 0.0
    for step in range(count):
        widths = step_widths(whole, plan.widths, step + 1, count, run.prepared.width_multiple)
        now = replace(plan, widths=widths, membership=_of_kept(plan.membership, cuts))
        adapter.cuts.clear()
        part = cut_layers(
            adapter,
            batches,
            now,
            subject.options,
            loss_roots=roots,
            clock=run.clock,
            store=Part(store, f"cut-{step + 1}-"),
        )
        cuts = composed(cuts, list(part.cuts))
        errors = [sum(pair) for pair in zip(errors, part.relative_errors, strict=True)]
        seconds = part.forward_seconds
        if step + 1 < count:
            ended = recover_model(run, subject.blocks, Part(store, f"step-{step + 1}-"), part=step)
            if ended.trained is None:
                ended.restore()
            for warning in ended.warnings:
                run.clock.note(f"warning: {warning}")
    adapter.cuts[:] = cuts
    trained = healed_tensors(adapter, run.prepared.checkpoint)
    if trained is None:  # what is written would not be what was measured
        raise FbnPruneError(
            "training between the cuts left weights that the checkpoint's dtype cannot hold: nothing was written; "
            "cut at once (--recover-cuts 1)"
        )
    return CutModel(adapter.cuts, seconds, tuple(errors), trained)


def step_widths(
    whole: Sequence[int], last: Sequence[int], step: int, count: int, multiple: int
) -> list[int]:
    """Return each layer's width after a step from 1 to `count`: multiples of `multiple`, or the last width."""
    if step == count:
        return list(last)
    exact = [a - (a - b) * step / count for a, b in zip(whole, last, strict=True)]
    return [
        max(b, min(a, round(width / multiple) * multiple))
        for a, b, width in zip(whole, last, exact, strict=True)
    ]


def composed(first: Sequence[MlpCut], second: Sequence[MlpCut]) -> list[MlpCut]:
    """Return the cuts of the whole model that `second` makes of one that `first` cut; none stand for no cut."""
    if not first:
        return list(second)
    return [
        replace(b, kept=a.kept.to(b.kept.device)[b.kept])
        for a, b in zip(first, second, strict=True)
    ]


def _of_kept(
    membership: Sequence[Tensor] | None, cuts: Sequence[MlpCut]
) -> Sequence[Tensor] | None:
    if membership is None or not cuts:
        return membership
    return [each[cut.kept.to(each.device)] for each, cut in zip(membership, cuts, strict=True)]
