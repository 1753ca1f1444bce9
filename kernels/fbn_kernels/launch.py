"""Launch the kernels: choose tiles from the table, compute sizes and allocate workspaces, without synchronising."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .kernels import down_kernel, hidden_kernel, reduce_kernel
from .neuron_set import BLOCK, Kind
from .tuning import (
    INTERPRETED,
    DownTile,
    HiddenTile,
    Tile,
    compute_units,
    table_for,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the kernels support."""

CUDA_PRECISION = "tf32x3"
"""Precision of float32 products on NVIDIA: three tensor core products, as accurate as float32."""

HIP_PRECISION = "ieee"
"""Precision of float32 products on AMD, whose matrix cores support float32."""

CHAINS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 5)
"""Whether this Triton compiles programmatic dependent launch; 3.4 has the option but fails."""

_PRECISION = HIP_PRECISION if torch.version.hip else CUDA_PRECISION
_GROUP_ROWS = 8
_REDUCE_WIDTH = 128
_REDUCE_PARTS = 16
_MAX_SPLIT = 16


@dataclass(frozen=True)
class Weights:
    """The whole MLP: `up` and `gate` [neurons, width], `down_t` [neurons, width], biases or None."""

    up: Tensor
    gate: Tensor | None
    down_t: Tensor
    up_bias: Tensor | None
    gate_bias: Tensor | None
    down_bias: Tensor | None


@dataclass(frozen=True)
class Membership:
    """Which neurons of the index list each row may use: `kept` uint8 [sets, padded], ids [rows]."""

    kept: Tensor
    set_ids: Tensor


@dataclass(frozen=True)
class Route:
    """Tiles of rows with an index list each, as in `NeuronBatch`; `largest` is the largest set."""

    order: Tensor
    tiles: Tensor
    table: Tensor
    block_rows: int
    largest: int


def launch_mlp(
    x: Tensor,
    weights: Weights,
    indices: Tensor,
    *,
    activation: str,
    count: int,
    kind: Kind,
    membership: Membership | None = None,
    route: Route | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Run the kernels on x [rows, width]; `tile`, which the tuner gives, overrides that of the table.

    Raises
    ------
    TypeError
        The dtype is not supported, or the dtypes differ.
    ValueError
        The rows of a weight are not contiguous.
    """
    _check(x, weights)
    rows, width = x.shape
    out = torch.empty(rows, weights.down_t.shape[1], dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    if tile is None:
        table = table_for(x.device)
        if route is None:
            tile = table.find(rows, count, width, x.dtype, kind)
        else:
            tile = table.find_routed(route.block_rows, rows, count, width, x.dtype, kind)
    # Triton launches on the current device, which may differ from that of the tensors.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        plan = _plan_down(out, count, route, tile.down)
        hidden = launch_hidden(
            x, weights, indices, activation, count, membership, route, tile.hidden, plan.arrivals
        )
        _launch_down(hidden, weights, indices, out, route, tile.down, plan)
    return out


def splits(tile: DownTile, row_tiles: int, width_tiles: int, kept_padded: int, units: int) -> int:
    """Return the number of parts of the sum over neurons that fills the device."""
    if tile.split is not None:
        return tile.split
    wanted = 2 * units // max(1, row_tiles * width_tiles)
    most = min(_MAX_SPLIT, kept_padded // tile.block_neurons)
    split = 1
    while split * 2 <= min(wanted, most):
        split *= 2
    return split


def _padded(count: int) -> int:
    return -(-count // BLOCK) * BLOCK


@functools.cache
def chained(device: torch.device) -> bool:
    """Return whether the device can start a kernel before the previous one has finished (Hopper and later)."""
    if device.type != "cuda" or torch.version.hip or not CHAINS:
        return False
    return torch.cuda.get_device_properties(device).major >= 9


def _launch_options(chain: bool) -> dict[str, bool]:
    # AMD's compiler does not have this option.
    return {"launch_pdl": True} if chain else {}


def launch_hidden(
    x: Tensor,
    weights: Weights,
    indices: Tensor,
    activation: str,
    count: int,
    membership: Membership | None,
    route: Route | None,
    tile: HiddenTile,
    arrivals: Tensor | None = None,
) -> Tensor:
    """Run only the hidden kernel; return [rows, `count` rounded up to a multiple of 64], with zeros in the padding.

    The kernel also zeroes `arrivals`, int32, whose length is a power of two.
    """
    rows, width = x.shape
    kept_padded = _padded(count)
    hidden = torch.empty(rows, kept_padded, dtype=x.dtype, device=x.device)
    block_rows = tile.block_rows if route is None else route.block_rows
    row_tiles = triton.cdiv(rows, block_rows) if route is None else route.tiles.shape[0]
    column_tiles = triton.cdiv(kept_padded, tile.block_neurons)
    gate = weights.gate
    chain = chained(x.device)
    hidden_kernel[(row_tiles * column_tiles,)](
        x,
        weights.up,
        gate,
        weights.up_bias,
        weights.gate_bias,
        indices,
        None if membership is None else membership.kept,
        None if membership is None else membership.set_ids,
        None if route is None else route.order,
        None if route is None else route.tiles,
        None if route is None else route.table,
        arrivals,
        hidden,
        rows,
        row_tiles,
        column_tiles,
        width,
        count,
        kept_padded,
        x.stride(0),
        weights.up.stride(0),
        0 if gate is None else gate.stride(0),
        hidden.stride(0),
        0 if membership is None else membership.kept.stride(0),
        ACTIVATION=activation,
        GATED=gate is not None,
        INTERLEAVED=gate is not None and tile.interleaved,
        UP_BIAS=weights.up_bias is not None,
        GATE_BIAS=weights.gate_bias is not None,
        MASKED=membership is not None,
        ROUTED=route is not None,
        ARRIVALS=0 if arrivals is None else len(arrivals),
        EVEN_WIDTH=width % tile.block_width == 0,
        INTERPRETED=INTERPRETED,
        PRECISION=_PRECISION,
        CHAINED=chain,
        BLOCK_ROWS=block_rows,
        BLOCK_NEURONS=tile.block_neurons,
        BLOCK_WIDTH=tile.block_width,
        GROUP_ROWS=_GROUP_ROWS,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **_launch_options(chain),
    )
    return hidden


@dataclass(frozen=True)
class _DownPlan:
    """The launch of the down kernel: its grid, the workspace of the parts, and the counters of finished parts."""

    block_rows: int
    row_tiles: int
    column_tiles: int
    split: int
    partial: Tensor | None
    arrivals: Tensor | None


def _plan_down(out: Tensor, count: int, route: Route | None, tile: DownTile) -> _DownPlan:
    rows, width = out.shape
    block_rows = tile.block_rows if route is None else route.block_rows
    row_tiles = triton.cdiv(rows, block_rows) if route is None else route.tiles.shape[0]
    column_tiles = triton.cdiv(width, tile.block_width)
    split = splits(tile, row_tiles, column_tiles, _padded(count), compute_units(out.device))
    partial = arrivals = None
    if split > 1:
        partial = torch.empty(split, rows, width, dtype=torch.float32, device=out.device)
        if tile.fixup:
            counters = triton.next_power_of_2(row_tiles * column_tiles)
            arrivals = torch.empty(counters, dtype=torch.int32, device=out.device)
    return _DownPlan(block_rows, row_tiles, column_tiles, split, partial, arrivals)


def _launch_down(
    hidden: Tensor,
    weights: Weights,
    indices: Tensor,
    out: Tensor,
    route: Route | None,
    tile: DownTile,
    plan: _DownPlan,
) -> None:
    rows, width = out.shape
    partial = plan.partial
    bias = weights.down_bias
    apart = partial is not None and plan.arrivals is None
    chain = chained(out.device)
    down_kernel[(plan.row_tiles * plan.column_tiles, plan.split)](
        hidden,
        weights.down_t,
        None if apart else bias,
        indices,
        None if route is None else route.order,
        None if route is None else route.tiles,
        None if route is None else route.table,
        plan.arrivals,
        partial,
        None if apart else out,
        rows,
        plan.row_tiles,
        plan.column_tiles,
        plan.split,
        width,
        hidden.shape[1],
        hidden.stride(0),
        weights.down_t.stride(0),
        0 if partial is None else partial.stride(1),
        0 if partial is None else partial.stride(0),
        out.stride(0),
        PARTIAL=partial is not None,
        FIXUP=0 if plan.arrivals is None else plan.split,
        BIAS=bias is not None and not apart,
        ROUTED=route is not None,
        EVEN_WIDTH=width % tile.block_width == 0,
        INTERPRETED=INTERPRETED,
        PRECISION=_PRECISION,
        CHAINED=chain,
        BLOCK_ROWS=plan.block_rows,
        BLOCK_NEURONS=tile.block_neurons,
        BLOCK_WIDTH=tile.block_width,
        GROUP_ROWS=_GROUP_ROWS,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **_launch_options(chain),
    )
    if partial is not None and apart:
        _launch_reduce(partial, bias, out)


def _launch_reduce(partial: Tensor, bias: Tensor | None, out: Tensor) -> None:
    parts, rows, width = partial.shape
    chain = chained(out.device)
    reduce_kernel[(rows, triton.cdiv(width, _REDUCE_WIDTH))](
        partial,
        bias,
        out,
        parts,
        width,
        partial.stride(1),
        partial.stride(0),
        out.stride(0),
        BIAS=bias is not None,
        CHAINED=chain,
        BLOCK_PARTS=_REDUCE_PARTS,
        BLOCK_WIDTH=_REDUCE_WIDTH,
        **_launch_options(chain),
    )


def _check(x: Tensor, weights: Weights) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"the kernels support float32, bfloat16 or float16, got {x.dtype}")
    for name in ("up", "gate", "down_t"):
        weight = getattr(weights, name)
        if weight is None:
            continue
        if weight.dtype != x.dtype:
            raise TypeError(f"{name} is {weight.dtype}, x is {x.dtype}")
        if weight.stride(1) != 1:
            raise ValueError(
                f"{name} must be stored row by row, got strides {tuple(weight.stride())}; "
                "keep down transposed, [neurons, width]"
            )
