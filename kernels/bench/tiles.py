"""Prints what tiles take on Hopper, without a GPU: registers, shared memory, instructions, and traffic.

Usage: python kernels/bench/tiles.py [--table sm_90] [--rows 128 --neurons 128 --width 64 --warps 8 --stages 4]

Each tile of the hidden kernel, apart and interleaved, is compiled ahead of time for sm_90 in bfloat16.
`traffic` is the time that shared memory needs over the time that the arithmetic needs, counted from the
instructions: a warp group's product of 64 rows, n columns and 16 of the model width reads 64 + n rows of
32 bytes from shared memory, what it reads has been copied there once for all warp groups, 128 bytes move
in a cycle, and 2048 multiplications are done in one. Above 1 the arithmetic waits. `L2` is what all programs
together would read from the second-level cache, in TB/s, to keep the measured peak of matrix products
(`h200.json`) busy: no form of the product changes it, only larger tiles do, or programs that share what
they read.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from fbn_kernels.aot import CHIPS, compile_hidden
from fbn_kernels.tuning import HiddenTile, load_table

BYTES_A_CYCLE = 128
PRODUCTS_A_CYCLE = 2048
DEPTH = 16
ROWS = 64
ROW_BYTES = 2 * DEPTH
PEAK = 701e12
"""Operations a second of a large product on an H200, as `bench/results/h200.json` has it."""


def traffic(tile: HiddenTile, columns: int) -> float:
    """Shared memory's time over the arithmetic's, for products of 64 rows and `columns` columns."""
    products = (tile.block_rows // ROWS) * (2 * tile.block_neurons // columns)
    read = products * (ROWS + columns) * ROW_BYTES
    written = (tile.block_rows + 2 * tile.block_neurons) * ROW_BYTES
    return (read + written) / BYTES_A_CYCLE / (products * ROWS * columns * DEPTH / PRODUCTS_A_CYCLE)


def cache_reads(tile: HiddenTile) -> float:
    """Bytes a second from the second-level cache at the measured peak."""
    columns = 2 * tile.block_neurons
    read = 2 * (tile.block_rows + columns)
    return PEAK * read / (2 * tile.block_rows * columns)


def main() -> None:
    """Print a line a tile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", default="sm_90", help="the table whose tiles to print")
    for name in ("rows", "neurons", "width", "warps", "stages"):
        parser.add_argument(f"--{name}", type=int, help="print this one tile instead")
    options = parser.parse_args()
    given = [getattr(options, name) for name in ("rows", "neurons", "width", "warps", "stages")]
    if all(given):
        tiles = [HiddenTile(*given)]
    elif any(given):
        parser.error("a tile needs --rows, --neurons, --width, --warps and --stages")
    else:
        entries = load_table(options.table).entries
        wide = (one.tile.hidden for one in entries if one.dtype != "float32")
        tiles = list(dict.fromkeys(replace(tile, interleaved=False) for tile in wide))
    print("rows neurons width warps stages form         registers  shared columns traffic    L2")
    for tile in tiles:
        for interleaved in (False, True):
            found = compile_hidden(
                CHIPS["sm_90"], replace(tile, interleaved=interleaved), torch.bfloat16
            )
            ratio = f"{traffic(tile, found.columns):.3f}" if found.columns else "-"
            print(
                f"{tile.block_rows:4} {tile.block_neurons:7} {tile.block_width:5} {tile.warps:5} "
                f"{tile.stages:6} {'interleaved' if interleaved else 'apart':11} "
                f"{found.registers:10} {found.shared:7} {found.columns:7} {ratio:>7} {cache_reads(tile) / 1e12:5.1f}"
            )


if __name__ == "__main__":
    main()
