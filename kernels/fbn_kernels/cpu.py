"""The gathered MLP on a CPU.

Sets whose neurons lie in long runs (prefixes, aligned blocks) are run without copying a weight: each
run is a view. Scattered rows would cost a gather of three matrices a call, far more than the call
itself, so their weights are copied once a set and kept, least recently used out first, within a
bound of bytes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .activations import activate
from .neuron_set import runs_of

DEFAULT_LIMIT_BYTES = 2 * 2**30
"""Bytes of compact weights kept unless `compact_cache.limit_bytes` is set otherwise."""

_FEW_TOKENS = 2
"""Up to so many tokens a weighted sum of rows beats a matrix product with a [neurons, width] view."""

_RUNS_KEPT = 4096

Value = TypeVar("Value")


@dataclass(frozen=True)
class CompactWeights:
    """The kept neurons alone: `up`, `gate` [kept, width], `down` [width, kept], biases or None."""

    up: Tensor
    gate: Tensor | None
    down: Tensor
    up_bias: Tensor | None
    gate_bias: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        held = (self.up, self.gate, self.down, self.up_bias, self.gate_bias)
        return sum(one.nbytes for one in held if one is not None)


@dataclass
class _Entry(Generic[Value]):
    value: Value
    nbytes: int
    versions: tuple[int, ...]
    storages: tuple[StorageWeakRef, ...]

    def fresh(self, versions: tuple[int, ...]) -> bool:
        return self.versions == versions and not self.expired()

    def expired(self) -> bool:
        return any(storage.expired() for storage in self.storages)


class TensorCache(Generic[Value]):
    """Values computed from tensors, dropped when those change, die, or room is needed.

    A tensor written to in place (its version counter tells) or freed invalidates what was computed
    from it. Writing through `.data`, or to a tensor made in inference mode, moves no counter: call
    `clear` after that.

    Parameters
    ----------
    limit_bytes
        Most bytes kept. A single value above it is computed at every call.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._entries: OrderedDict[tuple[object, ...], _Entry[Value]] = OrderedDict()
        self._lock = threading.Lock()
        self._nbytes = 0

    @property
    def limit_bytes(self) -> int:
        """Most bytes kept; setting it lower evicts at once."""
        return self._limit

    @limit_bytes.setter
    def limit_bytes(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"limit_bytes cannot be negative, got {limit}")
        with self._lock:
            self._limit = limit
            self._evict()

    @property
    def nbytes(self) -> int:
        """Bytes kept now."""
        return self._nbytes

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._nbytes = 0

    def get(
        self,
        tensors: tuple[Tensor | None, ...],
        compute: Callable[[], Value],
        nbytes_of: Callable[[Value], int],
    ) -> Value:
        """Return the value kept for these tensors, or compute and keep it."""
        present = [one for one in tensors if one is not None]
        key = tuple(None if one is None else _identity(one) for one in tensors)
        versions = tuple(0 if one.is_inference() else one._version for one in present)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.fresh(versions):
                self._entries.move_to_end(key)
                return entry.value
            if entry is not None:
                self._drop(key)
        value = compute()
        nbytes = nbytes_of(value)
        storages = tuple(StorageWeakRef(one.untyped_storage()) for one in present)
        with self._lock:
            for stale in [name for name, kept in self._entries.items() if kept.expired()]:
                self._drop(stale)
            if nbytes <= self._limit and key not in self._entries:
                self._entries[key] = _Entry(value, nbytes, versions, storages)
                self._nbytes += nbytes
                self._evict()
        return value

    def _drop(self, key: tuple[object, ...]) -> None:
        self._nbytes -= self._entries.pop(key).nbytes

    def _evict(self) -> None:
        while self._nbytes > self._limit:
            self._drop(next(iter(self._entries)))


compact_cache: TensorCache[CompactWeights] = TensorCache(DEFAULT_LIMIT_BYTES)
"""Compact weights of the sets in use on the CPU; `limit_bytes` bounds it, `clear()` empties it."""

_runs_cache: TensorCache[list[tuple[int, int]]] = TensorCache(_RUNS_KEPT)


def cpu_mlp(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down_t: Tensor,
    indices: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    mask: Tensor | None,
    *,
    activation: str,
    count: int,
    in_runs: bool,
    frozen: bool,
) -> Tensor:
    """Run x [rows, width] through the first `count` neurons of `indices`.

    Parameters
    ----------
    mask
        Factor of the hidden vector, [rows, count], or None.
    in_runs
        Whether the neurons lie in runs long enough to be read in place.
    frozen
        Whether compact weights may be kept for the next call.
    """
    if in_runs:
        runs = _runs_cache.get((indices,), lambda: runs_of(indices[:count]), lambda _: 1)
        hidden = _hidden_in_place(x, up, gate, up_bias, gate_bias, runs, activation)
        hidden = hidden if mask is None else hidden * mask
        out = _down_in_place(hidden, down_t, indices[:count], runs)
        return out if down_bias is None else out + down_bias

    def gather() -> CompactWeights:
        return _compact(up, gate, down_t, up_bias, gate_bias, indices[:count])

    watched = (indices, up, gate, down_t, up_bias, gate_bias)
    compact = compact_cache.get(watched, gather, lambda kept: kept.nbytes) if frozen else gather()
    hidden = F.linear(x, compact.up, compact.up_bias)
    if compact.gate is None:
        hidden = activate(activation, hidden)
    else:
        opened = F.linear(x, compact.gate, compact.gate_bias)
        hidden = activate(activation, opened) * hidden
    hidden = hidden if mask is None else hidden * mask
    return F.linear(hidden, compact.down, down_bias)


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _compact(
    up: Tensor,
    gate: Tensor | None,
    down_t: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    indices: Tensor,
) -> CompactWeights:
    def kept(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().index_select(0, indices)

    # The layout of an ordinary `down`: the product then rounds as in a model that was cut.
    down = down_t.detach().t().index_select(1, indices).contiguous()
    kept_up = up.detach().index_select(0, indices)
    return CompactWeights(kept_up, kept(gate), down, kept(up_bias), kept(gate_bias))


def _hidden_in_place(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    runs: list[tuple[int, int]],
    activation: str,
) -> Tensor:
    def through(weight: Tensor, bias: Tensor | None) -> Tensor:
        parts = [
            F.linear(x, weight[first:stop], None if bias is None else bias[first:stop])
            for first, stop in runs
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    risen = through(up, up_bias)
    if gate is None:
        return activate(activation, risen)
    return activate(activation, through(gate, gate_bias)) * risen


def _down_in_place(
    hidden: Tensor, down_t: Tensor, indices: Tensor, runs: list[tuple[int, int]]
) -> Tensor:
    few = 0 < hidden.shape[0] <= _FEW_TOKENS
    if few and down_t.is_contiguous() and down_t.device.type == "cpu":
        return _sum_rows(hidden, down_t, indices)
    out: Tensor | None = None
    start = 0
    for first, stop in runs:
        part = hidden[:, start : start + stop - first]
        rows = down_t[first:stop]
        out = part @ rows if out is None else torch.addmm(out, part, rows)
        start += stop - first
    assert out is not None
    return out


def _sum_rows(hidden: Tensor, down_t: Tensor, indices: Tensor) -> Tensor:
    """Return hidden @ down_t[indices] by `embedding_bag`, which reads the rows where they lie."""
    tokens, count = hidden.shape
    # One bag a thread: a bag is summed by one thread.
    bags = max(1, torch.get_num_threads() // tokens)
    size = -(-count // bags)
    starts = torch.arange(0, count, size)
    offsets = (torch.arange(tokens)[:, None] * count + starts).flatten()
    sums = F.embedding_bag(
        indices.repeat(tokens) if tokens > 1 else indices,
        down_t,
        offsets.to(indices.dtype),
        mode="sum",
        per_sample_weights=hidden.flatten(),
    )
    return sums.view(tokens, -1, down_t.shape[1]).sum(1)
