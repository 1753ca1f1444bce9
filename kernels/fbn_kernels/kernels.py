"""The Triton kernels: gathered up and gate with the activation, gathered down, and the reduction of its parts.

The hidden kernel reads the indices of its rows once, before the loop over the model width. The down kernel loops over
the kept neurons and loads the indices of the next rows one step ahead: a load inside the loop that waits for another
load would prevent the compiler from pipelining the loop.

A tile may interleave the rows of up and gate into one operand: one product with twice the columns, whose pairs of
columns are then split. Hopper multiplies 64 rows by at most 256 columns at a time, both from shared memory, so a 128 by
128 tile reads x once instead of twice for the same arithmetic.

`down` is stored transposed, because gathering its columns would touch nearly every memory sector. The padding of an
index list points at a valid row and the hidden kernel writes zeros there, so the down kernel needs no mask. Partial
sums go to a float32 workspace and are added in a fixed order, so results are reproducible. Either a separate kernel
adds them, or the program that finishes a tile last, which counts arrivals but adds in the same order.

On Hopper and later the three launches are chained (programmatic dependent launch): a kernel starts before the previous
one has finished, computes what depends only on weights and index lists, and waits before it reads the previous kernel's
output or writes anything.
"""

# A Triton function's arguments are pointers and sizes of the device's own; its branches on
# constants are clearer as blocks.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

# A size that changes from call to call must not compile the kernel again.
_SIZES = ["rows", "row_tiles", "kept", "splits", "parts"]


@triton.jit
def _activate(value, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        result = value * tl.sigmoid(value)
    elif ACTIVATION == "gelu":
        result = 0.5 * value * (1.0 + tl.math.erf(value * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2 u)
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        result = value * tl.sigmoid(2.0 * inner)
    else:
        tl.static_assert(ACTIVATION == "relu")
        result = tl.maximum(value, 0.0)
    return result


@triton.jit
def _dot(left, right, accumulator, INTERPRETED: tl.constexpr, PRECISION: tl.constexpr):
    if INTERPRETED:
        # The interpreter multiplies bfloat16 bit patterns.
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, accumulator, input_precision=PRECISION)


@triton.jit
def _swizzle(pid, row_tiles, column_tiles, GROUP_ROWS: tl.constexpr):
    """Order the tiles so that neighbours in time share weights and activations in the cache."""
    in_group = GROUP_ROWS * column_tiles
    group = pid // in_group
    first = group * GROUP_ROWS
    rows = min(row_tiles - first, GROUP_ROWS)
    within = pid % in_group
    return first + within % rows, within // rows


@triton.jit(do_not_specialize=_SIZES)
def hidden_kernel(
    x,
    up,
    gate,
    up_bias,
    gate_bias,
    indices,
    membership,
    set_ids,
    order,
    tiles,
    table,
    arrivals,
    hidden,
    rows,
    row_tiles,
    column_tiles,
    model_width,
    kept,
    kept_padded,
    x_stride,
    up_stride,
    gate_stride,
    hidden_stride,
    membership_stride,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UP_BIAS: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    ROUTED: tl.constexpr,
    ARRIVALS: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_NEURONS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """hidden[row, j] = act(x gate[indices[j]]) * (x up[indices[j]]), one tile a program.

    With `ARRIVALS` it also zeroes so many counters, for the down kernel.
    """
    row_tile, neuron_tile = _swizzle(tl.program_id(0), row_tiles, column_tiles, GROUP_ROWS)
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    if ARRIVALS > 0:  # noqa: SIM102 - a branch on a constant
        if tl.program_id(0) == 0:
            if CHAINED:
                tl.extra.cuda.gdc_wait()
            tl.store(arrivals + tl.arange(0, ARRIVALS), 0)
    position = tl.arange(0, BLOCK_ROWS)
    neuron = neuron_tile * BLOCK_NEURONS + tl.arange(0, BLOCK_NEURONS)
    if ROUTED:
        set_id = tl.load(tiles + 3 * row_tile)
        first = tl.load(tiles + 3 * row_tile + 1)
        stop = tl.load(tiles + 3 * row_tile + 2)
        indices += tl.load(table + 2 * set_id)
        kept = tl.load(table + 2 * set_id + 1)
        kept_padded = (kept + 63) // 64 * 64
        if (first >= stop) | (neuron_tile * BLOCK_NEURONS >= kept_padded):
            return
        position += first
        live = position < stop
        row = tl.load(order + position, mask=live, other=0)
    else:
        position += row_tile * BLOCK_ROWS
        live = position < rows
        row = position
    listed = neuron < kept_padded
    weight_row = tl.load(indices + neuron, mask=listed, other=0).to(tl.int64)
    column = tl.arange(0, BLOCK_WIDTH)
    x_tile = x + row.to(tl.int64)[:, None] * x_stride + column[None, :]
    if INTERLEAVED:
        pair = tl.arange(0, 2 * BLOCK_NEURONS)
        paired = neuron_tile * BLOCK_NEURONS + pair // 2
        paired_row = tl.load(indices + paired, mask=paired < kept_padded, other=0).to(tl.int64)
        start_of_row = tl.where(
            pair % 2 == 0, up + paired_row * up_stride, gate + paired_row * gate_stride
        )
        up_tile = start_of_row[None, :] + column[:, None]
        sums = tl.zeros((BLOCK_ROWS, 2 * BLOCK_NEURONS), dtype=tl.float32)
    else:
        up_tile = up + weight_row[None, :] * up_stride + column[:, None]
        sums = tl.zeros((BLOCK_ROWS, BLOCK_NEURONS), dtype=tl.float32)
        if GATED:
            gate_tile = gate + weight_row[None, :] * gate_stride + column[:, None]
            gate_sum = tl.zeros((BLOCK_ROWS, BLOCK_NEURONS), dtype=tl.float32)
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    for start in range(0, model_width, BLOCK_WIDTH):
        if EVEN_WIDTH:
            x_part = tl.load(x_tile + start, mask=live[:, None], other=0.0)
            up_part = tl.load(up_tile + start)
        else:
            inside = column < model_width - start
            x_part = tl.load(x_tile + start, mask=live[:, None] & inside[None, :], other=0.0)
            up_part = tl.load(up_tile + start, mask=inside[:, None], other=0.0)
        sums = _dot(x_part, up_part, sums, INTERPRETED, PRECISION)
        if GATED and not INTERLEAVED:
            if EVEN_WIDTH:
                gate_part = tl.load(gate_tile + start)
            else:
                gate_part = tl.load(gate_tile + start, mask=inside[:, None], other=0.0)
            gate_sum = _dot(x_part, gate_part, gate_sum, INTERPRETED, PRECISION)
    if INTERLEAVED:
        # A pair of columns lies in one thread's registers: nothing moves.
        up_sum, gate_sum = tl.split(tl.reshape(sums, (BLOCK_ROWS, BLOCK_NEURONS, 2)))
    else:
        up_sum = sums
    if UP_BIAS:
        up_sum += tl.load(up_bias + weight_row)[None, :].to(tl.float32)
    if GATED:
        if GATE_BIAS:
            gate_sum += tl.load(gate_bias + weight_row)[None, :].to(tl.float32)
        value = _activate(gate_sum, ACTIVATION) * up_sum
    else:
        value = _activate(up_sum, ACTIVATION)
    value = tl.where((neuron < kept)[None, :], value, 0.0)
    stored = live[:, None] & listed[None, :]
    if MASKED:
        owner = tl.load(set_ids + position, mask=live, other=0).to(tl.int64)
        member = tl.load(
            membership + owner[:, None] * membership_stride + neuron[None, :], mask=stored, other=0
        )
        value = tl.where(member != 0, value, 0.0)
    target = hidden + position.to(tl.int64)[:, None] * hidden_stride + neuron[None, :]
    tl.store(target, value.to(hidden.dtype.element_ty), mask=stored)


@triton.jit
def _store_out(total, down_bias, out, row, column, live, inside, out_stride, BIAS: tl.constexpr):
    if BIAS:
        total += tl.load(down_bias + column, mask=inside, other=0.0)[None, :].to(tl.float32)
    target = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit(do_not_specialize=_SIZES)
def down_kernel(
    hidden,
    down_t,
    down_bias,
    indices,
    order,
    tiles,
    table,
    arrivals,
    partial,
    out,
    rows,
    row_tiles,
    column_tiles,
    splits,
    model_width,
    kept_padded,
    hidden_stride,
    down_stride,
    partial_row_stride,
    partial_part_stride,
    out_stride,
    PARTIAL: tl.constexpr,
    FIXUP: tl.constexpr,
    BIAS: tl.constexpr,
    ROUTED: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_NEURONS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """out[row] = sum_j hidden[row, j] down_t[indices[j]], or with `PARTIAL` partial[split, row] = its share.

    With `FIXUP`, the number of splits, the program that finishes a tile last adds its parts up.
    """
    row_tile, width_tile = _swizzle(tl.program_id(0), row_tiles, column_tiles, GROUP_ROWS)
    split = tl.program_id(1)
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    position = tl.arange(0, BLOCK_ROWS)
    if ROUTED:
        set_id = tl.load(tiles + 3 * row_tile)
        first_row = tl.load(tiles + 3 * row_tile + 1)
        stop_row = tl.load(tiles + 3 * row_tile + 2)
        indices += tl.load(table + 2 * set_id)
        kept_padded = (tl.load(table + 2 * set_id + 1) + 63) // 64 * 64
        if first_row >= stop_row:
            return
        position += first_row
        live = position < stop_row
        row = tl.load(order + position, mask=live, other=0)
    else:
        position += row_tile * BLOCK_ROWS
        live = position < rows
        row = position
    share = tl.cdiv(kept_padded // BLOCK_NEURONS, splits) * BLOCK_NEURONS
    first = split * share
    stop = min(first + share, kept_padded)
    last_start = kept_padded - BLOCK_NEURONS
    column = width_tile * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = column < model_width
    lane = tl.arange(0, BLOCK_NEURONS)
    hidden_tile = hidden + position.to(tl.int64)[:, None] * hidden_stride + lane[None, :]
    weight_row = tl.load(indices + min(first, last_start) + lane)
    total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    for start in range(first, stop, BLOCK_NEURONS):
        ahead = min(start + BLOCK_NEURONS, last_start)
        next_row = tl.load(indices + ahead + lane)
        down_tile = down_t + weight_row.to(tl.int64)[:, None] * down_stride + column[None, :]
        if EVEN_WIDTH:
            down_part = tl.load(down_tile)
        else:
            down_part = tl.load(down_tile, mask=inside[None, :], other=0.0)
        hidden_part = tl.load(hidden_tile + start, mask=live[:, None], other=0.0)
        total = _dot(hidden_part, down_part, total, INTERPRETED, PRECISION)
        weight_row = next_row
    stored = live[:, None] & inside[None, :]
    if PARTIAL:
        part = partial + row.to(tl.int64)[:, None] * partial_row_stride + column[None, :]
        tl.store(part + split.to(tl.int64) * partial_part_stride, total, mask=stored)
    if FIXUP > 0:
        # All of this program's stores come before its arrival, all arrivals before the last one's loads.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + tl.program_id(0), 1, sem="acq_rel")
        if arrived == FIXUP - 1:
            total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
            for number in tl.static_range(FIXUP):
                source = part + tl.cast(number, tl.int64) * partial_part_stride
                total += tl.load(source, mask=stored, other=0.0, cache_modifier=".cg")
            _store_out(total, down_bias, out, row, column, live, inside, out_stride, BIAS)
    elif not PARTIAL:
        _store_out(total, down_bias, out, row, column, live, inside, out_stride, BIAS)


@triton.jit(do_not_specialize=_SIZES)
def reduce_kernel(
    partial,
    down_bias,
    out,
    parts,
    model_width,
    partial_row_stride,
    partial_part_stride,
    out_stride,
    BIAS: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """out[row] = the sum of partial[part, row], always in the same order, plus the bias."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = column < model_width
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    lane = tl.arange(0, BLOCK_PARTS)
    source = partial + row * partial_row_stride + column[None, :]
    sums = tl.zeros((BLOCK_PARTS, BLOCK_WIDTH), dtype=tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        part = first + lane
        sums += tl.load(
            source + part.to(tl.int64)[:, None] * partial_part_stride,
            mask=(part < parts)[:, None] & inside[None, :],
            other=0.0,
        )
    total = tl.sum(sums, 0)
    if BIAS:
        total += tl.load(down_bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, total.to(out.dtype.element_ty), mask=inside)
