"""Cut every layer of a live model, one at a time: statistics (:mod:`fbn_prune.pruning.evidence`), choice, refit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch
from fbn_prune.errors import FbnPruneError
from fbn_prune.model.families import Family
from fbn_prune.model.shards import packed
from fbn_prune.model.streaming import stream_of
from fbn_prune.model.surgery import MlpCut, apply_cut, cut_of_parts, cut_parts, rounded_cut
from fbn_prune.progress import StageClock
from fbn_prune.pruning.criteria import LayerEvidence
from fbn_prune.pruning.evidence import CutOptions, EvidencePass
from fbn_prune.pruning.fitting import DampingNotes, fitting_cut, fitting_head_cut
from fbn_prune.pruning.prediction import HEAD_WEIGHT, relative_error, relative_head_error
from fbn_prune.store import LAYERS, Store


@dataclass(frozen=True)
class CutModel:
    """The cuts of all layers, the seconds of one bare pass over the calibration tokens, and the layers' errors, see
    :func:`fbn_prune.pruning.prediction.relative_error`."""

    cuts: Sequence[MlpCut]
    forward_seconds: float
    relative_errors: tuple[float, ...]
    trained: Mapping[str, Tensor] | None = None
    """What a recovery changed, by the names that the checkpoint gives it; None without one."""


def cut_layers(
    model: PreTrainedModel,
    family: Family,
    batches: Sequence[Batch],
    widths: Sequence[int],
    options: CutOptions,
    *,
    membership: Sequence[Tensor] | None,
    loss_roots: Sequence[Tensor] | None = None,
    clock: StageClock,
    store: Store | None = None,
) -> CutModel:
    """Cut the layers of `model` in place to `widths` and return the cuts.

    Parameters
    ----------
    membership
        For each layer the largest abs z of its neurons over the kept networks, or None without networks.
    loss_roots
        For each layer R (see :func:`fbn_prune.pruning.second_order.loss_root`), or None to count errors alike.
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
    cuts: list[MlpCut] = []
    errors: list[float] = []
    notes = DampingNotes()
    stream = stream_of(model)

    def apply(layer: int, finished: FinishedLayer) -> None:
        errors.append(finished.relative_error)
        notes.add(layer, finished.notes)
        if stream is None:
            apply_cut(model, family, layer, finished.cut, round_to=options.round_to)
            cuts.append(finished.cut)
        else:
            stream.cut(finished.cut)

    def keep(layer: int, finished: FinishedLayer) -> None:
        store.write(_name(layer), lambda put: put(finished.to_bytes()))
        apply(layer, finished)

    def again(layer: int) -> None:
        data = store.read(_name(layer))
        if data is None:
            raise FbnPruneError(f"{_name(layer)} changed during the run: start it again")
        apply(layer, FinishedLayer.from_bytes(data))

    evidence = EvidencePass(
        model,
        family,
        batches,
        options,
        membership=membership,
        loss_roots=loss_roots,
        clock=clock,
        done=_finished_layers(store),
        again=again,
    )
    group: list[int] = []
    own: LayerEvidence | None = None
    for layer in evidence:
        group.append(layer.layer)
        if distributed.owner(layer.layer) == distributed.rank():
            own = layer
        del layer
        # One-shot, no layer waits for another: each process fits one of a group.
        whole = 1 if options.sequential else distributed.world()
        if len(group) < whole and group[-1] + 1 < len(widths):
            continue
        finished = None
        if own is not None:
            finished = _fitted(own, widths[own.layer], options)
        own = None
        for number in group:
            known = finished if distributed.owner(number) == distributed.rank() else None
            one = FinishedLayer.shared(known, distributed.owner(number))
            keep(number, one)
        group.clear()
    for line in notes.lines():
        clock.note(line)
    made = cuts if stream is None else stream.cuts
    return CutModel(made, evidence.forward_seconds, tuple(errors))


def _fitted(evidence: LayerEvidence, width: int, options: CutOptions) -> FinishedLayer:
    """The cut of one layer, and what was noticed on the way."""
    notes = DampingNotes()
    with notes.heard(evidence.layer):
        cut = fitting_cut(evidence, width, criterion=options.criterion, stored=options.round_to)
    error = relative_error(evidence, cut)
    if evidence.heads is not None and options.head_groups is not None:
        with notes.heard(evidence.layer, "attention: "):
            heads = fitting_head_cut(evidence.heads, options.head_groups, stored=options.round_to)
        error += HEAD_WEIGHT * relative_head_error(evidence.heads, heads)
        cut = replace(cut, heads=heads)
    return FinishedLayer(rounded_cut(cut, options.round_to), error, notes.of(evidence.layer))


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


def _finished_layers(store: Store) -> int:
    """How many layers, from the first on, an earlier run finished."""
    count = 0
    while store.read(_name(count)) is not None:
        count += 1
    return count
