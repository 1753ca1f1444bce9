"""Times candidate tiles on the GPU at hand and writes its tuning table.

Usage: python kernels/bench/tune.py --width 4096 --neurons 14336 [--dtype bfloat16] [--output PATH]

The hidden and the down kernel are tuned apart: first the hidden tile with the table's down tile, then
the down tile with the best hidden one. Candidates that the compiler would spill, or that ask for more
shared memory than the chip has, are dropped before they are run. Merges into the table that is
there, and records device, versions and commit.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import triton
from gpu_common import decode_microseconds, environment, gate_of, random_weights
from sets import draw_set

from fbn_kernels import Kind, NeuronSet, reference_mlp
from fbn_kernels.aot import CHIPS, Chip, compile_down, compile_hidden
from fbn_kernels.launch import Weights, launch_mlp
from fbn_kernels.tuning import (
    TOKEN_BUCKETS,
    DownTile,
    Entry,
    HiddenTile,
    Table,
    Tile,
    kept_bucket,
    load_table,
    read_table,
    save_table,
    table_for,
    table_path,
)

logger = logging.getLogger("tune")

ROWS = {8: (16,), 16: (16,), 32: (32,), 64: (32, 64), 128: (64, 128)}
SHARES = (0.3, 0.5, 0.7)


def hidden_candidates(tokens: int) -> Iterator[HiddenTile]:
    """Tiles worth trying for a token bucket."""
    for rows in ROWS.get(tokens, (64, 128)):
        for neurons, width, warps, stages in itertools.product(
            (64, 128), (32, 64, 128), (4, 8), (2, 3, 4, 5)
        ):
            yield HiddenTile(rows, neurons, width, warps, stages)


def down_candidates(tokens: int) -> Iterator[DownTile]:
    """Tiles worth trying for a token bucket; long calls need no split."""
    parts = (1,) if tokens >= 512 else (1, 2, 4, 8, 16)
    for rows in ROWS.get(tokens, (64, 128)):
        for neurons, width, warps, stages, split in itertools.product(
            (32, 64), (64, 128, 256), (4, 8), (2, 3, 4, 5), parts
        ):
            yield DownTile(rows, neurons, width, warps, stages, split)


def fits(chip: Chip, tile: HiddenTile | DownTile, dtype: torch.dtype) -> bool:
    """Whether the chip can launch the tile and the compiler does not spill it."""
    try:
        if isinstance(tile, HiddenTile):
            binary = compile_hidden(chip, tile, dtype)
        else:
            binary = compile_down(chip, tile, dtype, split=tile.split or 1)
    except Exception as error:
        logger.debug("%s does not compile: %s", tile, error)
        return False
    return binary.spilled == 0 and binary.shared <= chip.shared_limit


def best(candidates: Iterator[Tile], time: Callable[[Tile], float]) -> tuple[Tile, float]:
    """Return the fastest tile and its time in microseconds."""
    return min(((tile, time(tile)) for tile in candidates), key=lambda timed: timed[1])


def tune_call(
    tokens: int, neurons: NeuronSet, weights: list[Weights], chip: Chip
) -> tuple[Tile, float]:
    """Return the fastest tiles for a number of tokens through a set."""
    up = weights[0].up
    x = torch.randn(tokens, up.shape[1], dtype=up.dtype, device=up.device)
    start = table_for(x.device).find(tokens, neurons.count, x.shape[1], x.dtype, neurons.kind)
    first = weights[0]
    expected = reference_mlp(
        x.double(), first.up.double(), first.down_t.double(), neurons, gate=gate_of(first).double()
    )

    def call(tile: Tile, copy: Weights) -> torch.Tensor:
        return launch_mlp(
            x,
            copy,
            neurons.indices,
            activation="silu",
            count=neurons.count,
            kind=neurons.kind,
            tile=tile,
        )

    def time(tile: Tile) -> float:
        error = (call(tile, first).double() - expected).norm() / expected.norm()
        if not error < 1e-2:
            raise RuntimeError(f"{tile} is wrong: relative error {float(error):.2e}")
        return decode_microseconds(lambda copy: call(tile, copy), weights)

    hidden, _ = best(
        (
            replace(start, hidden=one)
            for one in hidden_candidates(tokens)
            if fits(chip, one, up.dtype)
        ),
        time,
    )
    return best(
        (replace(hidden, down=one) for one in down_candidates(tokens) if fits(chip, one, up.dtype)),
        time,
    )


def main() -> None:
    """Tune every token bucket and share for one MLP shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, required=True, help="model width")
    parser.add_argument("--neurons", type=int, required=True, help="neurons of the whole MLP")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKEN_BUCKETS))
    parser.add_argument("--output", type=Path, help="default: the table of this device")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not torch.cuda.is_available():
        parser.error("tuning needs a GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    architecture = triton.runtime.driver.active.get_current_target().arch
    chip = CHIPS.get(f"sm_{architecture}") or CHIPS.get(str(architecture))
    if chip is None:
        parser.error(f"no limits are known for architecture {architecture}: add it to CHIPS")
    path = options.output or table_path(name)
    base = read_table(path) if path.exists() else load_table(chip.name)
    dtype = getattr(torch, options.dtype)
    weights = random_weights(options.neurons, options.width, dtype, device)
    entries = {replace(entry, tile=base.entries[0].tile): entry for entry in base.entries}
    for share, kind in itertools.product(SHARES, (Kind.BLOCK64, Kind.ROWS)):
        neurons = draw_set(options.neurons, share, kind).to(device)
        for tokens in options.tokens:
            tile, microseconds = tune_call(tokens, neurons, weights, chip)
            entry = Entry(
                tile,
                tokens=tokens,
                kept=kept_bucket(neurons.count),
                model_width=options.width,
                dtype=options.dtype,
                kind=neurons.kind.value,
            )
            entries[replace(entry, tile=base.entries[0].tile)] = entry
            logger.info("%5d tokens, %s: %.1f us, %s", tokens, neurons, microseconds, tile)
            save_table(Table(name, environment(device), tuple(entries.values())), path)


if __name__ == "__main__":
    main()
