"""Launches the kernels: sizes, workspaces, and tiles from the table. Nothing here waits for the GPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .kernels import down_kernel, hidden_kernel, reduce_kernel
from .neuron_set import BLOCK, Kind
from .tuning import INTERPRETED, DownTile, HiddenTile, Tile, compute_units, table_for

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Floating types the kernels take."""

CUDA_PRECISION = "tf32x3"
"""How float32 is multiplied on NVIDIA: three tensor core products, whose error is float32's own."""

HIP_PRECISION = "ieee"
"""How float32 is multiplied on AMD, whose matrix cores take it as it is."""

_PRECISION = HIP_PRECISION if torch.version.hip else CUDA_PRECISION
_GROUP_ROWS = 8
_REDUCE_WIDTH = 1024
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
    """Run the kernels over x [rows, width]; `tile` overrides the table's (the tuner does).

    Raises
    ------
    TypeError
        For a dtype the kernels do not take, or mixed ones.
    ValueError
        For weights whose rows are not contiguous.
    """
    _check(x, weights)
    rows, width = x.shape
    out = torch.empty(rows, weights.down_t.shape[1], dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    if tile is None:
        tokens = rows if route is None else min(rows, route.block_rows)
        tile = table_for(x.device).find(tokens, count, width, x.dtype, kind)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        hidden = _launch_hidden(
            x, weights, indices, activation, count, kind, membership, route, tile.hidden
        )
        _launch_down(hidden, weights, indices, out, kind, route, tile.down)
    return out


def splits(tile: DownTile, row_tiles: int, width_tiles: int, kept_padded: int, units: int) -> int:
    """Return how many parts the sum over neurons is cut into, so that the device is filled."""
    if tile.split is not None:
        return tile.split
    wanted = 2 * units // max(1, row_tiles * width_tiles)
    most = min(_MAX_SPLIT, kept_padded // tile.block_neurons)
    split = 1
    while split * 2 <= min(wanted, most):
        split *= 2
    return split


def _launch_hidden(
    x: Tensor,
    weights: Weights,
    indices: Tensor,
    activation: str,
    count: int,
    kind: Kind,
    membership: Membership | None,
    route: Route | None,
    tile: HiddenTile,
) -> Tensor:
    rows, width = x.shape
    kept_padded = -(-count // BLOCK) * BLOCK
    hidden = torch.empty(rows, kept_padded, dtype=x.dtype, device=x.device)
    block_rows = tile.block_rows if route is None else route.block_rows
    row_tiles = triton.cdiv(rows, block_rows) if route is None else route.tiles.shape[0]
    column_tiles = triton.cdiv(kept_padded, tile.block_neurons)
    gate = weights.gate
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
        UP_BIAS=weights.up_bias is not None,
        GATE_BIAS=weights.gate_bias is not None,
        BLOCKS=kind is Kind.BLOCK64,
        MASKED=membership is not None,
        ROUTED=route is not None,
        EVEN_WIDTH=width % tile.block_width == 0,
        INTERPRETED=INTERPRETED,
        PRECISION=_PRECISION,
        BLOCK_ROWS=block_rows,
        BLOCK_NEURONS=tile.block_neurons,
        BLOCK_WIDTH=tile.block_width,
        GROUP_ROWS=_GROUP_ROWS,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return hidden


def _launch_down(
    hidden: Tensor,
    weights: Weights,
    indices: Tensor,
    out: Tensor,
    kind: Kind,
    route: Route | None,
    tile: DownTile,
) -> None:
    rows, width = out.shape
    kept_padded = hidden.shape[1]
    block_rows = tile.block_rows if route is None else route.block_rows
    row_tiles = triton.cdiv(rows, block_rows) if route is None else route.tiles.shape[0]
    column_tiles = triton.cdiv(width, tile.block_width)
    split = splits(tile, row_tiles, column_tiles, kept_padded, compute_units(out.device))
    bias = weights.down_bias
    partial = out
    if split > 1:
        partial = torch.empty(split, rows, width, dtype=torch.float32, device=out.device)
    down_kernel[(row_tiles * column_tiles, split)](
        hidden,
        weights.down_t,
        bias if split == 1 else None,
        indices,
        None if route is None else route.order,
        None if route is None else route.tiles,
        None if route is None else route.table,
        partial,
        rows,
        row_tiles,
        column_tiles,
        width,
        kept_padded,
        hidden.stride(0),
        weights.down_t.stride(0),
        partial.stride(-2),
        partial.stride(0) if split > 1 else 0,
        BIAS=bias is not None and split == 1,
        BLOCKS=kind is Kind.BLOCK64,
        ROUTED=route is not None,
        EVEN_WIDTH=width % tile.block_width == 0,
        INTERPRETED=INTERPRETED,
        PRECISION=_PRECISION,
        BLOCK_ROWS=block_rows,
        BLOCK_NEURONS=tile.block_neurons,
        BLOCK_WIDTH=tile.block_width,
        SPLIT=split,
        GROUP_ROWS=_GROUP_ROWS,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if split > 1:
        reduce_kernel[(rows, triton.cdiv(width, _REDUCE_WIDTH))](
            partial,
            bias,
            out,
            width,
            partial.stride(1),
            partial.stride(0),
            out.stride(0),
            BIAS=bias is not None,
            SPLIT=split,
            BLOCK_WIDTH=_REDUCE_WIDTH,
        )


def _check(x: Tensor, weights: Weights) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"the kernels take float32, bfloat16 or float16, got {x.dtype}")
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
