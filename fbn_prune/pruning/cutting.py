"""Cut every layer of a live model, one at a time: statistics (:mod:`fbn_prune.pruning.evidence`), choice, refit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from torch import Tensor

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch
from fbn_prune.errors import FbnPruneError
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.shards import packed
from fbn_prune.model.streaming import SpilledCuts
from fbn_prune.model.surgery import MlpCut, cut_of_parts, cut_parts, rounded_cut
from fbn_prune.progress import StageClock
from fbn_prune.pruning.criteria import LayerEvidence
from fbn_prune.pruning.evidence import CutOptions, EvidencePass
from fbn_prune.pruning.fitting import DampingNotes, fitting_cuts, fitting_head_cut
from fbn_prune.pruning.prediction import HEAD_WEIGHT, relative_error, relative_head_error
from fbn_prune.store import LAYERS, Store

Name = TypeVar("Name")


@dataclass(frozen=True)
class CutModel:
    """The cuts of all layers, the seconds of one bare pass over the calibration tokens, and the layers' errors, see
    :func:`fbn_prune.pruning.prediction.relative_error`."""

    cuts: Sequence[MlpCut]
    forward_seconds: float
    relative_errors: tuple[float, ...]
    trained: Mapping[str, Tensor] | None = None
    """What a recovery changed, by the names that the checkpoint gives it; None without one."""


@dataclass(frozen=True)
class CutPlan:
    """Which cut each layer is to get.

    Attributes
    ----------
    criterion
        Its name in :data:`fbn_prune.pruning.criteria.CRITERIA`.
    widths
        Neurons that each layer keeps.
    membership
        For each layer the largest abs z of its neurons over the kept networks, float64 [neurons]; None without
        networks.
    """

    criterion: str
    widths: Sequence[int]
    membership: Sequence[Tensor] | None = None


def cut_layers(
    adapter: ModelAdapter,
    batches: Sequence[Batch],
    plan: CutPlan,
    options: CutOptions,
    *,
    loss_roots: Sequence[Tensor] | None = None,
    clock: StageClock,
    store: Store | None = None,
) -> CutModel:
    """Cut the layers of the model in place and return the cuts.

    Parameters
    ----------
    loss_roots
        For each layer R [hidden, hidden] (see :func:`fbn_prune.pruning.second_order.loss_root`), or None to count all
        errors alike.
    store
        Where layers finished by an earlier run come from, and finished layers go.

    Raises
    ------
    InvalidInput
        A layer's activations are NaN or Inf; the layer is named.
    FbnPruneError
        The store cannot be written to, or a layer in it was damaged during the run.
    """
    store = store or Store()
    errors: list[float] = []
    notes = DampingNotes()

    def apply(layer: int, finished: FinishedLayer) -> None:
        errors.append(finished.relative_error)
        notes.add(layer, finished.notes)
        adapter.cut(layer, finished.cut, round_to=options.round_to)

    def keep(layer: int, finished: FinishedLayer) -> None:
        store.write(_name(layer), lambda put: put(finished.to_bytes()))
        apply(layer, finished)

    def again(layer: int) -> None:
        data = store.read(_name(layer))
        if data is None:
            raise FbnPruneError(f"{_name(layer)} changed during the run: start it again")
        apply(layer, FinishedLayer.from_bytes(data))

    evidence = EvidencePass(
        adapter,
        batches,
        options,
        loss_roots=loss_roots,
        clock=clock,
        done=_layers_done(store),
        again=again,
    )
    for layer, (finished,) in _finished_layers(evidence, adapter.num_layers, [plan], options):
        keep(layer, finished)
    for line in notes.lines():
        clock.note(line)
    return CutModel(adapter.cuts, evidence.forward_seconds, tuple(errors))


def try_cuts(
    adapter: ModelAdapter,
    batches: Sequence[Batch],
    plans: Mapping[Name, CutPlan],
    options: CutOptions,
    *,
    loss_roots: Sequence[Tensor] | None = None,
    scratch: Path,
    clock: StageClock,
    stage: str = "prune",
) -> tuple[dict[Name, SpilledCuts], list[str]]:
    """The cuts of all layers that each plan leads to, from one pass over the calibration data; the model stays whole.

    Attention heads are left out of account, and every layer is fitted on what the dense model gives it.

    Parameters
    ----------
    scratch
        Folder for the cuts: those of many plans come to more than the model.

    Returns
    -------
    cuts
        By the plans' names.
    notes
        What had to be damped otherwise than asked for, a line each.
    """
    options = replace(options, sequential=False, head_groups=None)
    evidence = EvidencePass(
        adapter, batches, options, loss_roots=loss_roots, clock=clock, stage=stage
    )
    cuts = {name: SpilledCuts(scratch) for name in plans}
    notes = DampingNotes()
    wanted = list(plans.values())
    for layer, finished in _finished_layers(evidence, adapter.num_layers, wanted, options):
        for name, one in zip(plans, finished, strict=True):
            cuts[name].append(one.cut)
            notes.add(layer, one.notes)
    return cuts, notes.lines()


def _finished_layers(
    evidence: EvidencePass, layers: int, plans: Sequence[CutPlan], options: CutOptions
) -> Iterator[tuple[int, list[FinishedLayer]]]:
    """Each layer's number in order, and what each plan makes of it."""
    group: list[int] = []
    own: LayerEvidence | None = None
    for layer in evidence:
        group.append(layer.layer)
        if distributed.owner(layer.layer) == distributed.rank():
            own = layer
        del layer
        # Unless sequential, no layer waits for another: each process fits one of a group.
        whole = 1 if options.sequential else distributed.world()
        if len(group) < whole and group[-1] + 1 < layers:
            continue
        finished: list[FinishedLayer] | None = None
        if own is not None:
            finished = _fitted(own, plans, options)
        own = None
        for number in group:
            source = distributed.owner(number)
            mine = finished is not None and source == distributed.rank()
            known = finished if mine and finished is not None else [None] * len(plans)
            yield number, [FinishedLayer.shared(one, source) for one in known]
        group.clear()


def _fitted(
    evidence: LayerEvidence, plans: Sequence[CutPlan], options: CutOptions
) -> list[FinishedLayer]:
    """The cut of one layer by each plan, and what was noticed on the way."""
    layer, stored = evidence.layer, options.round_to
    alike: dict[tuple[str, int], list[int]] = {}
    for index, plan in enumerate(plans):
        alike.setdefault((plan.criterion, id(plan.membership)), []).append(index)
    heads, head_error, head_notes = None, 0.0, DampingNotes()
    if evidence.heads is not None and options.head_groups is not None:
        with head_notes.heard(layer, "attention: "):
            heads = fitting_head_cut(evidence.heads, options.head_groups, stored=stored)
        head_error = HEAD_WEIGHT * relative_head_error(evidence.heads, heads)
    done: dict[int, FinishedLayer] = {}
    for (criterion, _), group in alike.items():
        members = plans[group[0]].membership
        here = None if members is None else members[layer].to(evidence.weight.device)
        evidence = replace(evidence, membership=here)
        widths = {plans[index].widths[layer] for index in group}
        notes = DampingNotes()
        with notes.heard(layer):
            cuts = fitting_cuts(evidence, widths, criterion=criterion, stored=stored)
        notes.add(layer, head_notes.of(layer))
        for index in group:
            cut = cuts[plans[index].widths[layer]]
            error = relative_error(evidence, cut) + head_error if len(plans) == 1 else math.nan
            cut = rounded_cut(replace(cut, heads=heads), stored)
            done[index] = FinishedLayer(cut, error, notes.of(layer))
    return [done[index] for index in range(len(plans))]


@dataclass(frozen=True)
class FinishedLayer:
    """A layer's cut, rounded as it will be stored, the relative error of its MLP with its attention's share, and what
    is to be said of its damping."""

    cut: MlpCut
    relative_error: float
    notes: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """As a safetensors file holds it."""
        parts = cut_parts(self.cut)
        parts["relative_error"] = torch.tensor(self.relative_error, dtype=torch.float64)
        parts["notes"] = torch.tensor(list(json.dumps(self.notes).encode()), dtype=torch.uint8)
        return packed(parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> FinishedLayer:
        """What :meth:`to_bytes` wrote, on the CPU."""
        parts = safetensors.torch.load(data)
        notes = json.loads(bytes(parts["notes"].tolist()))
        return cls(cut_of_parts(parts), float(parts["relative_error"]), tuple(notes))

    @classmethod
    def shared(cls, finished: FinishedLayer | None, source: int) -> FinishedLayer:
        """The layer that the process `source` finished, on all processes of the job."""
        if finished is not None and distributed.world() == 1:
            return finished
        data = distributed.broadcast(None if finished is None else finished.to_bytes(), source)
        assert data is not None
        return finished or cls.from_bytes(data)


def _name(layer: int) -> str:
    """Of a finished layer in the store."""
    return f"{LAYERS}{layer:05d}.safetensors"


def _layers_done(store: Store) -> int:
    """How many layers, from the first on, an earlier run finished."""
    count = 0
    while store.read(_name(count)) is not None:
        count += 1
    return count
