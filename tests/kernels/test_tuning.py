"""A tuning table gives every call a tile, the most specific one it has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fbn_kernels import Kind
from fbn_kernels.tuning import (
    TABLES,
    TOKEN_BUCKETS,
    DownTile,
    Entry,
    HiddenTile,
    Table,
    Tile,
    kept_bucket,
    read_table,
    save_table,
    table_path,
    token_bucket,
)


def tile(rows: int) -> Tile:
    return Tile(HiddenTile(rows, 64, 64, 4, 3), DownTile(rows, 64, 128, 4, 3))


TABLE = Table(
    "some chip",
    None,
    (
        Entry(tile(16)),
        Entry(tile(32), tokens=64),
        Entry(tile(64), tokens=64, dtype="float32", kept=2048),
    ),
)


@pytest.mark.parametrize(
    ("tokens", "kept", "dtype", "rows"),
    [
        (1, 2000, torch.bfloat16, 16),
        (64, 2000, torch.bfloat16, 32),
        (40, 2000, torch.float32, 64),
        (40, 900, torch.float32, 32),
    ],
)
def test_the_most_specific_entry_wins(
    tokens: int, kept: int, dtype: torch.dtype, rows: int
) -> None:
    assert TABLE.find(tokens, kept, 512, dtype, Kind.ROWS) == tile(rows)


def test_a_table_without_a_fitting_entry_says_so() -> None:
    table = Table("some chip", None, (Entry(tile(16), tokens=8),))
    with pytest.raises(LookupError, match="'some chip' has no tile for"):
        table.find(9, 64, 512, torch.float32, Kind.ROWS)


@pytest.mark.parametrize(
    ("block_rows", "rows", "found", "warps"), [(16, 9, 16, 4), (64, 900, 32, 8), (128, 200, 16, 8)]
)
def test_a_routed_tile_is_that_of_a_call_of_its_height(
    block_rows: int, rows: int, found: int, warps: int
) -> None:
    low = tile(found)
    expected = Tile(
        replace(low.hidden, block_rows=block_rows, warps=warps),
        replace(low.down, block_rows=block_rows, warps=warps),
    )
    routed = TABLE.find_routed(block_rows, rows, 2000, 512, torch.bfloat16, Kind.ROWS)
    assert routed == expected


def test_a_table_survives_the_disk(tmp_path: Path) -> None:
    save_table(TABLE, tmp_path / "table.json")
    assert read_table(tmp_path / "table.json") == TABLE


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_every_table_has_a_tile_for_every_call(path: Path) -> None:
    table = read_table(path)
    assert table_path(table.device) == path
    for tokens in TOKEN_BUCKETS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = table.find(tokens, 7000, 4096, dtype, Kind.ROWS)
            assert 16 <= found.hidden.block_rows <= max(16, tokens)
            assert 16 <= found.down.block_rows <= max(16, tokens)


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(1, 8), (8, 8), (9, 16), (2048, 2048), (9000, 2048)]
)
def test_tokens_fall_into_buckets(tokens: int, bucket: int) -> None:
    assert token_bucket(tokens) == bucket


@pytest.mark.parametrize(
    ("kept", "bucket"), [(1, 1), (64, 64), (65, 96), (4301, 6144), (7168, 8192)]
)
def test_kept_neurons_fall_into_half_octaves(kept: int, bucket: int) -> None:
    assert kept_bucket(kept) == bucket


def test_a_down_tile_may_not_straddle_the_padding() -> None:
    with pytest.raises(ValueError, match="must divide 64, got 128"):
        DownTile(16, 128, 64, 4, 3)
