"""The gathered MLP on a CPU.

Rows in long runs are read in place. For short runs the overhead of a call exceeds the time to read, so their rows of
`up` and `gate` are copied into one tensor for each set, which is cached within a limit of bytes. `down` is never
copied: for few tokens its rows are summed in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import activate
from .cache import TensorCache
from .neuron_set import runs_of

DEFAULT_LIMIT_BYTES = 2 * 2**30
"""Default of `compact_cache.limit_bytes`, the size of the cached copies."""

LONG_RUN_BYTES = 2 * 2**20
"""Size of a run of one matrix from which reading in place is faster than copying."""

_GATHER_BYTES = 4 * 2**20
"""Rows are gathered in pieces of this size, which fit into the processor's cache."""

_FEW_TOKENS = 8
"""Up to this number of tokens, summing rows in place is faster than gathering them for a matrix product."""

_READINGS_KEPT = 4096


@dataclass(frozen=True, eq=False)
class Reading:
    """How the rows of a set are read: long runs in place, then the other rows from a copy.

    Attributes
    ----------
    runs
        The long runs, (first, one past the last).
    loose
        int32: the rows outside long runs, ascending.
    order
        int32 [count]: the neurons in the order of the hidden vector.
    position
        int64 [count]: the position of each of `order` in the set's list; None if the orders are equal.
    """

    runs: tuple[tuple[int, int], ...]
    loose: Tensor
    order: Tensor
    position: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, row_bytes: int) -> Reading:
        """Decide how to read `rows`, ascending integers on the CPU, of `row_bytes` bytes each."""
        rows = rows.to(torch.int64)
        found = runs_of(rows)
        runs = found
        if len(found) > 1:
            runs = [run for run in found if (run[1] - run[0]) * row_bytes >= LONG_RUN_BYTES]
        in_place = torch.zeros(len(rows), dtype=torch.bool)
        for first, stop in runs:
            in_place |= (rows >= first) & (rows < stop)
        position = torch.cat([torch.nonzero(kept).flatten() for kept in (in_place, ~in_place)])
        moved = bool((position[1:] < position[:-1]).any())
        order = rows[position].to(torch.int32)
        return cls(tuple(runs), order[int(in_place.sum()) :], order, position if moved else None)


@dataclass(frozen=True, eq=False)
class LooseRows:
    """Copies of a reading's loose rows: `up`, `gate` [loose, width], biases [loose] or None."""

    up: Tensor
    gate: Tensor | None
    up_bias: Tensor | None
    gate_bias: Tensor | None

    @classmethod
    def gather(
        cls,
        rows: Tensor,
        up: Tensor,
        gate: Tensor | None,
        up_bias: Tensor | None,
        gate_bias: Tensor | None,
    ) -> LooseRows:
        """Copy `rows`, int32 [loose], of each."""

        def kept(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.detach().index_select(0, rows)

        return cls(up.detach().index_select(0, rows), kept(gate), kept(up_bias), kept(gate_bias))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        held = (self.up, self.gate, self.up_bias, self.gate_bias)
        return sum(one.nbytes for one in held if one is not None)


compact_cache: TensorCache[LooseRows] = TensorCache(DEFAULT_LIMIT_BYTES)
"""The copied rows of the sets used on the CPU."""

_readings: TensorCache[Reading] = TensorCache(_READINGS_KEPT)


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
    frozen: bool,
) -> Tensor:
    """Run x [rows, width] through the first `count` neurons of `indices`.

    Parameters
    ----------
    mask
        Factor of the hidden vector, [rows, count], or None.
    frozen
        Whether copies of rows may be kept for the next call.
    """
    reading, hidden = _cached_hidden(
        x, up, gate, indices, up_bias, gate_bias, mask, activation, count, frozen
    )
    out = down_in_place(hidden, down_t, reading, torch.get_num_threads())
    return out if down_bias is None else out + down_bias


def cpu_hidden(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    indices: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    mask: Tensor | None,
    *,
    activation: str,
    count: int,
    frozen: bool,
) -> Tensor:
    """Return the hidden vector, [rows, count] in the order of `indices`; see `cpu_mlp`."""
    reading, hidden = _cached_hidden(
        x, up, gate, indices, up_bias, gate_bias, mask, activation, count, frozen
    )
    if reading.position is None:
        return hidden
    return torch.empty_like(hidden).index_copy_(1, reading.position, hidden)


def _cached_hidden(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    indices: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    mask: Tensor | None,
    activation: str,
    count: int,
    frozen: bool,
) -> tuple[Reading, Tensor]:
    row_bytes = up.shape[1] * up.element_size()
    reading = _readings.get(
        (indices, up), lambda: Reading.of(indices[:count], row_bytes), lambda _: 1
    )

    def gather() -> LooseRows:
        return LooseRows.gather(reading.loose, up, gate, up_bias, gate_bias)

    loose = None
    if len(reading.loose):
        watched = (indices, up, gate, up_bias, gate_bias)
        loose = compact_cache.get(watched, gather, lambda kept: kept.nbytes) if frozen else gather()
    hidden = hidden_in_place(x, up, gate, up_bias, gate_bias, reading, loose, activation)
    if mask is not None:
        hidden = hidden * (mask if reading.position is None else mask[:, reading.position])
    return reading, hidden


def hidden_in_place(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    reading: Reading,
    loose: LooseRows | None,
    activation: str,
) -> Tensor:
    """Return the hidden vector of x [rows, width], [rows, count] in the order of the reading.

    Without `loose` the rows outside long runs are gathered.
    """

    def through(
        weight: Tensor, bias: Tensor | None, copied: Tensor | None, copied_bias: Tensor | None
    ) -> Tensor:
        parts = [
            F.linear(x, weight[first:stop], None if bias is None else bias[first:stop])
            for first, stop in reading.runs
        ]
        if copied is not None:
            parts.append(F.linear(x, copied, copied_bias))
        elif len(reading.loose):
            for rows in _pieces(reading.loose, weight):
                some = None if bias is None else bias.index_select(0, rows)
                parts.append(F.linear(x, weight.index_select(0, rows), some))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    more_up = (None, None) if loose is None else (loose.up, loose.up_bias)
    risen = through(up, up_bias, *more_up)
    if gate is None:
        return activate(activation, risen)
    more_gate = (None, None) if loose is None else (loose.gate, loose.gate_bias)
    return activate(activation, through(gate, gate_bias, *more_gate)) * risen


def down_in_place(hidden: Tensor, down_t: Tensor, reading: Reading, threads: int) -> Tensor:
    """Return the product of hidden [rows, count] and the reading's rows of `down_t`, [rows, width out]."""
    few = 0 < hidden.shape[0] <= _FEW_TOKENS
    if few and down_t.is_contiguous():
        return _sum_rows(hidden, down_t, reading.order, threads)
    out: Tensor | None = None
    start = 0
    for first, stop in reading.runs:
        part = hidden[:, start : start + stop - first]
        rows = down_t[first:stop]
        out = part @ rows if out is None else torch.addmm(out, part, rows)
        start += stop - first
    if len(reading.loose):
        for piece in _pieces(reading.loose, down_t):
            part, rows = hidden[:, start : start + len(piece)], down_t.index_select(0, piece)
            out = part @ rows if out is None else torch.addmm(out, part, rows)
            start += len(piece)
    assert out is not None
    return out


def _pieces(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(64, _GATHER_BYTES // (weight.shape[1] * weight.element_size())))


def _sum_rows(hidden: Tensor, down_t: Tensor, order: Tensor, threads: int) -> Tensor:
    """Return hidden @ down_t[order] by `embedding_bag`, which reads the rows where they lie."""
    tokens, count = hidden.shape
    # One bag for each thread, because a bag is summed by one thread.
    bags = max(1, threads // tokens)
    size = -(-count // bags)
    starts = torch.arange(0, count, size)
    offsets = (torch.arange(tokens)[:, None] * count + starts).flatten()
    sums = F.embedding_bag(
        order.repeat(tokens) if tokens > 1 else order,
        down_t,
        offsets.to(order.dtype),
        mode="sum",
        per_sample_weights=hidden.flatten(),
    )
    return sums.view(tokens, -1, down_t.shape[1]).sum(1)
