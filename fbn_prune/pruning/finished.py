"""Finished layers: a layer's cut with its error, as a run stores it and as processes exchange it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

import safetensors.torch
import torch

from fbn_prune import distributed
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.shards import packed
from fbn_prune.model.surgery import MlpCut, cut_of_parts, cut_parts
from fbn_prune.pruning.prediction import HEAD_WEIGHT
from fbn_prune.store import LAYERS, Store


@dataclass(frozen=True)
class FinishedLayer:
    """A layer's cut in the stored dtype, its relative error (MLP plus weighted attention), and damping messages."""

    cut: MlpCut
    relative_error: float
    notes: tuple[str, ...] = ()
    weighted_error: float = math.nan
    """See :class:`fbn_prune.pruning.prediction.RoughError`; known only where many cuts are compared."""

    @classmethod
    def left_out(cls, adapter: ModelAdapter, layer: int) -> FinishedLayer:
        """Return what stands for a layer that the cut model does not have: one neuron without an output.

        Its relative error is that of an MLP and an attention that compute nothing.
        """
        nothing = torch.zeros(adapter.hidden_size, 1)
        return cls(MlpCut(torch.zeros(1, dtype=torch.int64), nothing), 1 + HEAD_WEIGHT)

    def to_bytes(self) -> bytes:
        """Return the content of a safetensors file."""
        parts = cut_parts(self.cut)
        errors = self.relative_error, self.weighted_error
        parts["errors"] = torch.tensor(errors, dtype=torch.float64)
        parts["notes"] = torch.tensor(list(json.dumps(self.notes).encode()), dtype=torch.uint8)
        return packed(parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> FinishedLayer:
        """Read the bytes of :meth:`to_bytes`, to the CPU."""
        parts = safetensors.torch.load(data)
        notes = json.loads(bytes(parts["notes"].tolist()))
        relative, weighted = parts["errors"].tolist()
        return cls(cut_of_parts(parts), relative, tuple(notes), weighted)

    @classmethod
    def shared(cls, finished: FinishedLayer | None, source: int) -> FinishedLayer:
        """Broadcast the layer that the process `source` finished to all processes."""
        if finished is not None and distributed.world() == 1:
            return finished
        data = distributed.broadcast(None if finished is None else finished.to_bytes(), source)
        assert data is not None
        return finished or cls.from_bytes(data)


def layer_file(layer: int) -> str:
    """Return the file name of a finished layer in the store."""
    return f"{LAYERS}{layer:05d}.safetensors"


def layers_done(store: Store) -> int:
    """Return the number of consecutive layers, from the first, that an earlier run finished."""
    count = 0
    while store.read(layer_file(count)) is not None:
        count += 1
    return count


def keep_finished(store: Store, finished: Iterable[FinishedLayer]) -> None:
    """Store the layers, so that :func:`fbn_prune.pruning.cutting.cut_layers` takes them as finished."""
    for layer, one in enumerate(finished):
        data = one.to_bytes()
        store.write(layer_file(layer), lambda put, data=data: put(data))  # type: ignore[misc]
