"""Every tile of every tuning table compiles to what its chip can launch, without spilling."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from fbn_kernels import Kind
from fbn_kernels.routing import ROUTED_ROWS
from fbn_kernels.tuning import TABLES, DownTile, HiddenTile, load_table, read_table

pytest.importorskip("triton")
aot = pytest.importorskip("fbn_kernels.aot")

TWO_BYTES = (torch.bfloat16, torch.float16)


def tiles(device: str, part: str) -> list[tuple[HiddenTile | DownTile, tuple[torch.dtype, ...]]]:
    """The distinct tiles of a table with the dtypes they are used for."""
    found = {}
    for entry in load_table(device).entries:
        given = () if entry.dtype is None else (getattr(torch, entry.dtype),)
        found[getattr(entry.tile, part), entry.dtype] = given or TWO_BYTES
    return [(tile, dtypes) for (tile, _), dtypes in found.items()]


def tuned_tables() -> list[tuple[str, str]]:
    """The tables of single devices, each with its architecture."""
    tables = (read_table(path) for path in sorted(TABLES.glob("*.json")))
    return [(one.device, one.measured["architecture"]) for one in tables if one.measured]


TABLES_AND_CHIPS = [*((name, name) for name in aot.CHIPS), *tuned_tables()]


def check(binary: aot.Binary, chip: aot.Chip, tile: HiddenTile | DownTile) -> None:
    assert binary.spilled == 0
    assert binary.shared <= chip.shared_limit
    assert binary.matrix_instructions > 0
    if chip.target.backend == "cuda" and tile.stages > 1:
        assert binary.async_copies > 0
    if chip.name == "sm_90" and tile.block_rows >= 64:
        assert binary.wgmma > 0


@pytest.mark.parametrize(("device", "architecture"), TABLES_AND_CHIPS)
def test_every_tile_fits_its_chip(device: str, architecture: str) -> None:
    chip = aot.CHIPS[architecture]
    for tile, dtypes in tiles(device, "hidden"):
        check(aot.compile_hidden(chip, tile, dtypes[0]), chip, tile)
    # The number of parts is an argument of the kernel; whether there are several decides its output.
    for tile, dtypes in tiles(device, "down"):
        binary = aot.compile_down(chip, tile, dtypes[0], split=tile.split or 4)
        check(binary, chip, tile)


@pytest.mark.slow
@pytest.mark.parametrize("device", aot.CHIPS)
def test_every_variant_fits_its_chip(device: str) -> None:
    """Each tile in two of the variants, each variant in several tiles."""
    chip = aot.CHIPS[device]
    hidden_variants = [
        {"gated": False, "activation": "relu"},
        {"gated": False, "activation": "gelu", "biased": True},
        {"activation": "gelu_tanh", "biased": True, "masked": True},
        {"arrivals": 32},
        {"routed": True, "biased": True, "even_width": False},
    ]
    down_variants = [
        {"split": 4},
        {"biased": True},
        {"split": 8},
        {"routed": True, "split": 4},
        {"routed": True, "biased": True, "even_width": False},
    ]
    for part, variants in (("hidden", hidden_variants), ("down", down_variants)):
        for number, (tile, dtypes) in enumerate(tiles(device, part)):
            for variant in (variants[number % 5], variants[(number + 2) % 5]):
                check(
                    getattr(aot, f"compile_{part}")(chip, tile, dtypes[-1], **variant), chip, tile
                )


@pytest.mark.slow
@pytest.mark.parametrize(("device", "architecture"), TABLES_AND_CHIPS)
def test_every_tile_of_a_routed_batch_fits_its_chip(device: str, architecture: str) -> None:
    chip, table = aot.CHIPS[architecture], load_table(device)
    calls = product(ROUTED_ROWS, (1, 8), (4300, 7168), (torch.bfloat16, torch.float32))
    found = {
        (table.find_routed(height, height * times, kept, 4096, dtype, Kind.ROWS), dtype)
        for height, times, kept, dtype in calls
    }
    for hidden, dtype in {(tile.hidden, dtype) for tile, dtype in found}:
        binary = aot.compile_hidden(chip, hidden, dtype, routed=True)
        check(binary, chip, hidden)
    for down, dtype in {(tile.down, dtype) for tile, dtype in found}:
        binary = aot.compile_down(chip, down, dtype, routed=True, split=down.split or 4)
        check(binary, chip, down)


def test_interleaving_doubles_hoppers_matrix_instruction_and_moves_nothing() -> None:
    apart = HiddenTile(128, 128, 64, warps=8, stages=4)
    together = replace(apart, interleaved=True)
    chip = aot.CHIPS["sm_90"]
    one, two = (aot.compile_hidden(chip, tile, torch.bfloat16) for tile in (together, apart))
    assert (one.columns, two.columns) == (256, 128)
    assert 2 * one.wgmma == two.wgmma
    # The buffers of the pipeline and no more: the halves are split where they are.
    assert one.shared == two.shared == 2 * 4 * 64 * (128 + 2 * 128)


@pytest.mark.parametrize("device", aot.CHIPS)
def test_adding_the_parts_up_spills_nothing(device: str) -> None:
    chip = aot.CHIPS[device]
    for split in (2, 8):
        tile = DownTile(16, 64, 64, warps=4, stages=2, split=split, fixup=True)
        binary = aot.compile_down(chip, tile, torch.bfloat16, split=split, biased=True)
        check(binary, chip, tile)
