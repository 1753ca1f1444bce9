"""Times candidate tiles on the GPU at hand and writes its tuning table.

Usage: python kernels/bench/tune.py --width 4096 --neurons 14336 [--dtype bfloat16] [--output PATH]

Compiling costs more than timing, so all candidates are first compiled by as many processes as there
are cores, into Triton's cache on disk; those that a chip cannot launch fall out there. For every
share every candidate is timed, the hidden tile first, then the down tile beside the best hidden one,
then the best few of both in pairs: what suits half of the neurons need not suit a third. A tile that
spills or is wrong is never taken. Merges into the table that is there, and records device, versions
and commit.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_common import architecture, environment, gate_of, random_weights, replay_microseconds
from sets import draw_set

from fbn_kernels import Kind, NeuronSet, reference_mlp
from fbn_kernels.kernels import down_kernel, hidden_kernel
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
    table_path,
)

logger = logging.getLogger("tune")

SHARES = (0.5, 0.3, 0.7, 1.0)
"""Shares of neurons to tune for; the first one's tiles serve other widths too."""

PARTS = (1, 2, 4, 6, 8, 12, 16)
FIXUP_PARTS = (2, 4, 6, 8)
TOLERANCE = 1e-2
FINALISTS = 10
PAIRED = 4
SHARED_LIMIT = 226 * 1024
ACCUMULATORS = 128


def hidden_candidates(tokens: int) -> Iterator[HiddenTile]:
    """Tiles worth trying for a token bucket."""
    if tokens <= 32:
        sizes = itertools.product((max(16, tokens),), (16, 32, 64), (64, 128, 256), (4,), (3, 4, 5))
    elif tokens <= 64:
        sizes = itertools.product((64,), (32, 64, 128), (64, 128), (4, 8), (3, 4))
    elif tokens <= 256:
        sizes = itertools.product((64, 128), (64, 128), (64,), (4, 8), (3, 4))
    else:
        sizes = itertools.product((64, 128, 256), (64, 128, 256), (32, 64), (4, 8), (3, 4))
    for rows, neurons, width, warps, stages in sizes:
        shared = 2 * stages * width * (rows + 2 * neurons)
        if shared <= SHARED_LIMIT and 2 * rows * neurons <= ACCUMULATORS * 32 * warps:
            # One operand of twice the columns pays where the product goes through shared memory.
            for interleaved in (False, True) if rows >= 32 else (False,):
                yield HiddenTile(rows, neurons, width, warps, stages, interleaved)


def down_candidates(tokens: int) -> Iterator[DownTile]:
    """Tiles worth trying for a token bucket; long calls need no split."""
    parts = (1,) if tokens >= 512 else PARTS
    if tokens <= 32:
        sizes = itertools.product((max(16, tokens),), (32, 64), (32, 64, 128, 256), (4,), (3, 4, 5))
    elif tokens <= 64:
        sizes = itertools.product((64,), (32, 64), (64, 128, 256), (4, 8), (3, 4))
    elif tokens <= 256:
        sizes = itertools.product((64, 128), (64,), (128, 256), (4, 8), (3, 4))
    else:
        sizes = itertools.product((64, 128, 256), (32, 64), (128, 256), (4, 8), (3, 4))
    for rows, neurons, width, warps, stages in sizes:
        shared = 2 * stages * neurons * (rows + width)
        if shared <= SHARED_LIMIT and rows * width <= ACCUMULATORS * 32 * warps:
            for split in parts:
                for fixup in (False, True) if split in FIXUP_PARTS else (False,):
                    yield DownTile(rows, neurons, width, warps, stages, split, fixup)


def compiled_as(tile: Tile) -> Tile:
    """Return the tile whose binary this one takes: a reduced sum's number of parts is an argument."""
    down = tile.down
    if down.fixup:
        return tile
    return replace(tile, down=replace(down, split=min(2, down.split or 1)))


@dataclass(frozen=True)
class Call:
    """An MLP call to tune, in numbers alone, so that another process can make it again."""

    width: int
    neurons: int
    dtype: str
    kind: Kind
    tokens: int


@functools.cache
def _one_copy(neurons: int, width: int, dtype: str) -> Weights:
    device = torch.device("cuda", torch.cuda.current_device())
    return random_weights(neurons, width, getattr(torch, dtype), device, copies=1)[0]


def launchable(call: Call, tile: Tile) -> bool:
    """Compile and launch a tile once; False where the chip cannot, or registers are spilled."""
    weights = _one_copy(call.neurons, call.width, call.dtype)
    neurons = draw_set(call.neurons, SHARES[0], call.kind).to(weights.up.device)
    x = torch.zeros(call.tokens, call.width, dtype=weights.up.dtype, device=weights.up.device)
    # Emptied, so that afterwards they hold this launch's binaries alone.
    caches = [kernel.device_caches for kernel in (hidden_kernel, down_kernel)]
    for cache in caches:
        cache.clear()
    try:
        _launch(x, weights, neurons, tile)
        torch.cuda.synchronize()
    except Exception as error:
        logger.debug("%s: %s", tile, error)
        return False
    binaries = [
        binary for cache in caches for entry in cache.values() for binary in entry[0].values()
    ]
    return bool(binaries) and not any(binary.n_spills for binary in binaries)


def _launch(x: torch.Tensor, weights: Weights, neurons: NeuronSet, tile: Tile) -> torch.Tensor:
    return launch_mlp(
        x,
        weights,
        neurons.indices,
        activation="silu",
        count=neurons.count,
        kind=neurons.kind,
        tile=tile,
    )


class Tuner:
    """Times tiles for one MLP shape.

    Parameters
    ----------
    weights
        Copies of the MLP, together larger than any cache.
    """

    def __init__(self, weights: list[Weights]) -> None:
        self.weights = weights
        up = weights[0].up
        self.dtype, self.device = up.dtype, up.device
        self.neurons, self.width = up.shape

    def timed(
        self, x: torch.Tensor, neurons: NeuronSet, tiles: list[Tile], replays: int
    ) -> list[tuple[float, Tile]]:
        """Return (microseconds, tile), fastest first."""
        found = [
            (
                replay_microseconds(
                    lambda copy: _launch(x, copy, neurons, tile),  # noqa: B023
                    self.weights,
                    replays=replays,
                ),
                tile,
            )
            for tile in tiles
        ]
        return sorted(found, key=lambda one: one[0])

    def best(self, tokens: int, neurons: NeuronSet, tiles: list[Tile]) -> list[tuple[float, Tile]]:
        """Return the finalists with their times, those that compute something else left out.

        Raises
        ------
        RuntimeError
            If none is right.
        """
        x = torch.randn(tokens, self.width, dtype=self.dtype, device=self.device)
        quick = self.timed(x, neurons, tiles, 5)[:FINALISTS]
        finalists = self.timed(x, neurons, [tile for _, tile in quick], 25)
        first = self.weights[0]
        expected = reference_mlp(
            x.double(),
            first.up.double(),
            first.down_t.double(),
            neurons,
            gate=gate_of(first).double(),
        )
        right = []
        for microseconds, tile in finalists:
            found = _launch(x, first, neurons, tile).double()
            error = float((found - expected).norm() / expected.norm())
            if error < TOLERANCE:
                right.append((microseconds, tile))
            else:
                logger.error("wrong, relative error %.1e: %s", error, tile)
        if not right:
            raise RuntimeError(f"every tile is wrong for {tokens} tokens through {neurons}")
        return right

    def tune(
        self,
        tokens: int,
        neurons: NeuronSet,
        start: Tile,
        hidden: list[HiddenTile],
        down: list[DownTile],
    ) -> tuple[float, Tile]:
        """Return the fastest tile of these halves and its microseconds, from `start`'s down on."""
        first = self.best(tokens, neurons, [replace(start, hidden=one) for one in hidden])
        second = self.best(tokens, neurons, [replace(first[0][1], down=one) for one in down])
        pairs = itertools.product(second[:PAIRED], first[:PAIRED])
        tiles = [replace(tile, hidden=other.hidden) for (_, tile), (_, other) in pairs]
        return self.best(tokens, neurons, tiles)[0]


def compile_all(jobs: list[tuple[Call, Tile]]) -> list[tuple[Call, Tile]]:
    """Compile tiles side by side; return those that could be launched."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        calls, tiles = [call for call, _ in jobs], [tile for _, tile in jobs]
        fine = list(pool.map(launchable, calls, tiles, chunksize=4))
    return [job for job, good in zip(jobs, fine, strict=True) if good]


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
    base_name = architecture()
    if not table_path(base_name).exists():
        parser.error(f"architecture {base_name} has no table of its own to start from")
    path = options.output or table_path(name)
    base = read_table(path) if path.exists() else load_table(base_name)
    dtype = getattr(torch, options.dtype)
    entries = {replace(entry, tile=base.entries[0].tile): entry for entry in base.entries}

    def record(tile: Tile, **keys: Any) -> None:
        entry = Entry(tile, dtype=options.dtype, **keys)
        entries[replace(entry, tile=base.entries[0].tile)] = entry

    kinds = (Kind.BLOCK64, Kind.ROWS)
    calls = [
        Call(options.width, options.neurons, options.dtype, kind, tokens)
        for kind, tokens in itertools.product(kinds, options.tokens)
    ]
    starts = {
        call: base.find(call.tokens, options.neurons // 2, options.width, dtype, call.kind)
        for call in calls
    }
    began = time.perf_counter()
    hidden = [
        (call, replace(starts[call], hidden=one))
        for call in calls
        for one in hidden_candidates(call.tokens)
    ]
    down = [
        (call, replace(starts[call], down=one))
        for call in calls
        for one in down_candidates(call.tokens)
    ]
    several = {(call, compiled_as(tile)) for call, tile in down}
    able = set(compile_all([*hidden, *several]))
    logger.info(
        "%d of %d tiles compiled in %.0f s",
        len(able),
        len(hidden) + len(several),
        time.perf_counter() - began,
    )
    hidden = [job for job in hidden if job in able]
    down = [(call, tile) for call, tile in down if (call, compiled_as(tile)) in able]
    tuner = Tuner(random_weights(options.neurons, options.width, dtype, device))
    for call, share in itertools.product(calls, SHARES):
        neurons = draw_set(options.neurons, share, call.kind).to(device)
        if neurons.kind is not call.kind:
            continue
        microseconds, tile = tuner.tune(
            call.tokens,
            neurons,
            starts[call],
            [tile.hidden for one, tile in hidden if one == call],
            [tile.down for one, tile in down if one == call],
        )
        if share == SHARES[0]:
            record(tile, tokens=call.tokens, kind=call.kind.value)
        record(
            tile,
            tokens=call.tokens,
            kept=kept_bucket(neurons.count),
            model_width=options.width,
            kind=call.kind.value,
        )
        logger.info("%5d tokens, %s: %.1f us, %s", call.tokens, neurons, microseconds, tile)
        save_table(Table(name, environment(device), tuple(entries.values())), path)
    logger.info("%.0f s in all", time.perf_counter() - began)


if __name__ == "__main__":
    main()
