"""Cut every layer of a live model, one at a time: collect evidence, choose neurons, refit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch
from fbn_prune.errors import FbnPruneError
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.depth import leave_out
from fbn_prune.model.streaming import spilled_cuts
from fbn_prune.model.surgery import CutsOnRequest, MlpCut, rounded_cut
from fbn_prune.progress import StageClock
from fbn_prune.pruning.criteria import LayerEvidence
from fbn_prune.pruning.evidence import CutOptions, EvidencePass
from fbn_prune.pruning.finished import FinishedLayer, layer_file, layers_done
from fbn_prune.pruning.fitting import (
    DampingNotes,
    fitting_cuts,
    fitting_erasure,
    fitting_head_cut,
)
from fbn_prune.pruning.prediction import (
    HEAD_WEIGHT,
    RoughError,
    relative_error,
    relative_head_error,
    rough_errors,
)
from fbn_prune.store import Store

Name = TypeVar("Name")


@dataclass(frozen=True)
class CutModel:
    """The cuts of all layers.

    Attributes
    ----------
    forward_seconds
        Time of one bare forward pass over the calibration tokens.
    relative_errors
        For each layer, see :func:`fbn_prune.pruning.prediction.relative_error`.
    trained
        Tensors that recovery changed, by their names in the checkpoint; None without recovery.
    """

    cuts: Sequence[MlpCut]
    forward_seconds: float
    relative_errors: tuple[float, ...]
    trained: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class CutPlan:
    """The criterion and widths by which to cut the layers.

    Attributes
    ----------
    criterion
        Name in :data:`fbn_prune.pruning.criteria.CRITERIA`.
    widths
        Number of neurons that each layer keeps.
    membership
        For each layer, the largest abs z of its neurons over the kept networks, float64 [neurons]; None without
        networks.
    left_out
        Layers that the cut model does not have; their widths do not matter.
    erase
        Strength with which the output on a skill's text is made small instead of cutting neurons, see
        :func:`fbn_prune.pruning.second_order.erased`; None to cut.
    head_groups
        For each layer, the groups of attention heads that it keeps; needs sequential mode. None keeps all.
    """

    criterion: str
    widths: Sequence[int]
    membership: Sequence[Tensor] | None = None
    left_out: frozenset[int] = frozenset()
    erase: float | None = None
    head_groups: Sequence[int] | None = None


def cut_layers(
    adapter: ModelAdapter,
    batches: Sequence[Batch],
    plan: CutPlan,
    options: CutOptions,
    *,
    loss_roots: Sequence[Tensor] | None = None,
    skill: Sequence[Batch] = (),
    clock: StageClock,
    store: Store | None = None,
) -> CutModel:
    """Cut the layers of the model in place and return the cuts.

    Parameters
    ----------
    loss_roots
        R [hidden, hidden] for each layer (see :func:`fbn_prune.pruning.second_order.loss_root`); None to count all
        errors alike.
    skill
        Text of a skill, for a plan that erases it.
    store
        Keeps finished layers, and provides those that an earlier run finished; None keeps nothing.

    Raises
    ------
    InvalidInput
        A layer's activations contain NaN or Inf; the message names the layer.
    FbnPruneError
        The store cannot be written, or a finished layer in it was damaged during the run.
    """
    store = store or Store()
    errors: list[float] = []
    notes = DampingNotes()

    def apply(layer: int, finished: FinishedLayer) -> None:
        errors.append(finished.relative_error)
        notes.add(layer, finished.notes)
        if layer in plan.left_out:
            leave_out(adapter, [layer])
        adapter.cut(layer, finished.cut, round_to=options.round_to)

    def keep(layer: int, finished: FinishedLayer) -> None:
        store.write(layer_file(layer), lambda put: put(finished.to_bytes()))
        apply(layer, finished)

    def again(layer: int) -> None:
        data = store.read(layer_file(layer))
        if data is None:
            raise FbnPruneError(
                f"{layer_file(layer)} was changed during the run: start the run again"
            )
        apply(layer, FinishedLayer.from_bytes(data))

    evidence = EvidencePass(
        adapter,
        batches,
        options,
        loss_roots=loss_roots,
        skill=skill,
        clock=clock,
        done=layers_done(store),
        again=again,
        left_out=plan.left_out,
        head_groups=plan.head_groups,
        passed=lambda layer: keep(layer, FinishedLayer.left_out(adapter, layer)),
    )
    for layer, (finished,) in _finished_layers(evidence, adapter.num_layers, [plan], options):
        keep(layer, finished)
    for line in notes.lines():
        clock.note(line)
    return CutModel(adapter.cuts, evidence.forward_seconds, tuple(errors))


def cut_as_tried(
    adapter: ModelAdapter,
    finished: Iterable[FinishedLayer],
    options: CutOptions,
    *,
    forward_seconds: float,
    clock: StageClock,
    stage: str = "prune",
) -> CutModel:
    """Cut the layers of the model in place as :func:`try_cuts` cut them, and return the cuts."""
    errors: list[float] = []
    notes = DampingNotes()
    with clock.stage(stage, adapter.num_layers, "layers") as advance:
        for layer, one in enumerate(finished):
            errors.append(one.relative_error)
            notes.add(layer, one.notes)
            adapter.cut(layer, one.cut, round_to=options.round_to)
            advance(1)
    for line in notes.lines():
        clock.note(line)
    return CutModel(adapter.cuts, forward_seconds, tuple(errors))


@dataclass(frozen=True)
class TriedCuts(Generic[Name]):
    """The cuts of several plans, by the names of the plans.

    Attributes
    ----------
    notes
        One line for each change of damping.
    errors
        For each layer, the error of its output; empty if they were not asked for.
    forward_seconds
        See :class:`CutModel`.
    """

    cuts: Mapping[Name, Sequence[MlpCut]]
    notes: list[str]
    errors: Mapping[Name, list[RoughError]]
    forward_seconds: float
    _heard: Mapping[Name, list[tuple[str, ...]]]

    def picked(self, place: Callable[[int, int], Name], names: Sequence[int]) -> TriedCuts[int]:
        """Return cuts by other names: of each layer, those of the plan that `place` returns for a name and a layer."""
        layers = range(len(next(iter(self._heard.values()))))

        def cut(name: int, layer: int) -> MlpCut:
            return self.cuts[place(name, layer)][layer]

        return TriedCuts(
            {name: CutsOnRequest(partial(cut, name), len(layers)) for name in names},
            self.notes,
            {name: [self.errors[place(name, at)][at] for at in layers] for name in names},
            self.forward_seconds,
            {name: [self._heard[place(name, at)][at] for at in layers] for name in names},
        )

    def finished(self, names: Sequence[Name]) -> Iterator[FinishedLayer]:
        """Yield each layer as the plan with that name cut it; the errors must have been asked for."""
        for layer, name in enumerate(names):
            relative = self.errors[name][layer].relative
            yield FinishedLayer(self.cuts[name][layer], relative, self._heard[name][layer])


def try_cuts(
    adapter: ModelAdapter,
    batches: Sequence[Batch],
    plans: Mapping[Name, CutPlan],
    options: CutOptions,
    *,
    loss_roots: Sequence[Tensor] | None = None,
    skill: Sequence[Batch] = (),
    scratch: Path,
    clock: StageClock,
    stage: str = "prune",
    errors: bool = False,
) -> TriedCuts[Name]:
    """Make the cuts of several plans in one pass over the calibration data, without changing the model.

    Attention heads are not cut, and every layer is fitted to the dense model's activations.

    Parameters
    ----------
    skill
        Text of a skill, for plans that erase it.
    scratch
        Folder for the cuts, since those of many plans are larger than the model.
    errors
        Also compute the layers' errors.
    """
    options = replace(options, sequential=False, head_groups=None)
    evidence = EvidencePass(
        adapter, batches, options, loss_roots=loss_roots, skill=skill, clock=clock, stage=stage
    )
    cuts = {name: spilled_cuts(scratch) for name in plans}
    notes = DampingNotes()
    wanted = list(plans.values())
    found: dict[Name, list[RoughError]] = {name: [] for name in plans}
    heard: dict[Name, list[tuple[str, ...]]] = {name: [] for name in plans}
    for layer, finished in _finished_layers(
        evidence, adapter.num_layers, wanted, options, errors=errors
    ):
        for name, one in zip(plans, finished, strict=True):
            cuts[name].append(one.cut)
            if errors:
                found[name].append(RoughError(one.weighted_error, one.relative_error))
            heard[name].append(one.notes)
            notes.add(layer, one.notes)
    return TriedCuts(cuts, notes.lines(), found, evidence.forward_seconds, heard)


def _finished_layers(
    evidence: EvidencePass,
    layers: int,
    plans: Sequence[CutPlan],
    options: CutOptions,
    *,
    errors: bool = False,
) -> Iterator[tuple[int, list[FinishedLayer]]]:
    """Each layer's number in order, with its cut by each plan."""
    group: list[int] = []
    own: LayerEvidence | None = None
    for layer in evidence:
        group.append(layer.layer)
        if distributed.owner(layer.layer) == distributed.rank():
            own = layer
        del layer
        # Without sequential mode, layers do not depend on one another: each process fits one layer of a group.
        size = 1 if options.sequential else distributed.world()
        if len(group) < size and group[-1] + 1 < layers:
            continue
        finished: list[FinishedLayer] | None = None
        if own is not None:
            finished = _fitted(own, plans, options)
            if errors:
                rough = rough_errors(own, [one.cut for one in finished])
                finished = [
                    replace(one, relative_error=error.relative, weighted_error=error.weighted)
                    for one, error in zip(finished, rough, strict=True)
                ]
        own = None
        for number in group:
            source = distributed.owner(number)
            known: Sequence[FinishedLayer | None] = [None] * len(plans)
            if finished is not None and source == distributed.rank():
                known = finished
            yield number, [FinishedLayer.shared(one, source) for one in known]
        group.clear()


def _fitted(
    evidence: LayerEvidence, plans: Sequence[CutPlan], options: CutOptions
) -> list[FinishedLayer]:
    """The cut of one layer by each plan, with error and notes."""
    layer, stored = evidence.layer, options.round_to
    alike: dict[tuple[str, int, float | None], list[int]] = {}
    for index, plan in enumerate(plans):
        alike.setdefault((plan.criterion, id(plan.membership), plan.erase), []).append(index)
    heads, head_error, head_notes = None, 0.0, DampingNotes()
    if evidence.heads is not None and options.head_groups is not None:
        with head_notes.heard(layer, "attention: "):
            heads = fitting_head_cut(evidence.heads, options.head_groups, stored=stored)
        head_error = HEAD_WEIGHT * relative_head_error(evidence.heads, heads)
    elif (known := evidence.head_cut) is not None:
        heads, head_error = known.cut, HEAD_WEIGHT * known.relative_error
        head_notes.add(layer, known.notes)
    done: dict[int, FinishedLayer] = {}
    for (criterion, _, erase), group in alike.items():
        members = plans[group[0]].membership
        membership = None if members is None else members[layer].to(evidence.weight.device)
        evidence = replace(evidence, membership=membership)
        widths = {plans[index].widths[layer] for index in group}
        notes = DampingNotes()
        with notes.heard(layer):
            if erase is None:
                cuts = fitting_cuts(evidence, widths, criterion=criterion, stored=stored)
            else:
                whole = fitting_erasure(evidence, erase, stored=stored)
                cuts = dict.fromkeys(widths, whole)
        notes.add(layer, head_notes.of(layer))
        for index in group:
            cut = cuts[plans[index].widths[layer]]
            error = relative_error(evidence, cut) + head_error if len(plans) == 1 else math.nan
            cut = rounded_cut(replace(cut, heads=heads), stored)
            done[index] = FinishedLayer(cut, error, notes.of(layer))
    return [done[index] for index in range(len(plans))]
