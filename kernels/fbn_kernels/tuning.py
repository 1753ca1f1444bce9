"""Choose the tile sizes of a call from JSON tables, one for each device, which the tuner writes.

Nothing is tuned at run time. The entries of a table are keyed by token bucket, kept bucket, model width, dtype and kind
of set; a null key matches everything, and the most specific entry is used. A device without its own table uses that of
its architecture.
"""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from .neuron_set import BLOCK, Kind

TABLES = Path(__file__).parent / "tables"
"""The folder of the tables."""

TOKEN_BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Upper ends of the token buckets; the last one also holds larger numbers."""

_HIGH = 128
_MOST_WARPS = 8

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
"""Whether Triton's interpreter runs the kernels on CPU tensors, from the variable that Triton reads."""

FALLBACK = "sm_80"
"""The table for devices without a table of their own or of their architecture."""


@dataclass(frozen=True)
class HiddenTile:
    """Tile of the fused up, gate and activation kernel.

    `interleaved` multiplies up and gate as one operand of `2 * block_neurons` columns.
    """

    block_rows: int
    block_neurons: int
    block_width: int
    warps: int
    stages: int
    interleaved: bool = False


@dataclass(frozen=True)
class DownTile:
    """Tile of the down kernel; if `split` is None, the shape decides the number of splits.

    With `fixup` the program that finishes a tile last adds the parts of its splits; otherwise a separate kernel does.
    """

    block_rows: int
    block_neurons: int
    block_width: int
    warps: int
    stages: int
    split: int | None = None
    fixup: bool = False

    def __post_init__(self) -> None:
        if BLOCK % self.block_neurons:
            raise ValueError(f"down's block_neurons must divide {BLOCK}, got {self.block_neurons}")


_Part = TypeVar("_Part", HiddenTile, DownTile)


@dataclass(frozen=True)
class Tile:
    """The tiles of both kernels of a call."""

    hidden: HiddenTile
    down: DownTile


@dataclass(frozen=True)
class Entry:
    """A tile and the calls that it is for; None matches any."""

    tile: Tile
    tokens: int | None = None
    kept: int | None = None
    model_width: int | None = None
    dtype: str | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Table:
    """The tiles of a device or an architecture.

    Attributes
    ----------
    device
        Name of the device or architecture.
    measured
        Where and how the tiles with a model width were timed; None if none were. Entries for any width are untimed
        starting points.
    entries
        The tiles.
    """

    device: str
    measured: dict[str, Any] | None
    entries: tuple[Entry, ...]

    def find(
        self, tokens: int, kept: int, model_width: int, dtype: torch.dtype, kind: Kind
    ) -> Tile:
        """Return the tile of the most specific entry that matches; a prefix uses the entries of blocks.

        Raises
        ------
        LookupError
            No entry matches.
        """
        wanted = {
            "tokens": token_bucket(tokens),
            "kept": kept_bucket(kept),
            "model_width": model_width,
            "dtype": str(dtype).removeprefix("torch."),
            "kind": (Kind.BLOCK64 if kind is Kind.PREFIX else kind).value,
        }
        best, best_score = None, -1
        for entry in self.entries:
            keys = {name: getattr(entry, name) for name in wanted}
            if any(key is not None and key != wanted[name] for name, key in keys.items()):
                continue
            score = sum(key is not None for key in keys.values())
            if score > best_score:
                best, best_score = entry.tile, score
        if best is None:
            raise LookupError(f"table {self.device!r} has no tile for {wanted}")
        return best

    def find_routed(
        self,
        block_rows: int,
        rows: int,
        kept: int,
        model_width: int,
        dtype: torch.dtype,
        kind: Kind,
    ) -> Tile:
        """Return the tile for a batch of `rows` whose sets are each cut into tiles of `block_rows`.

        Tiles with few rows are those of a call with that many tokens, tiles with many rows those of a long call.
        """
        tokens = min(rows, block_rows) if block_rows < _HIGH else max(rows, 2 * _HIGH)
        tile = self.find(tokens, kept, model_width, dtype, kind)
        return Tile(_with_rows(tile.hidden, block_rows), _with_rows(tile.down, block_rows))


def _with_rows(tile: _Part, block_rows: int) -> _Part:
    """Change the rows of a tile, with more warps for more rows, so that the work of a thread stays the same."""
    warps = tile.warps * max(1, block_rows // tile.block_rows)
    return replace(tile, block_rows=block_rows, warps=min(warps, _MOST_WARPS))


def token_bucket(tokens: int) -> int:
    """Return the upper end of the bucket of `tokens`."""
    return next((end for end in TOKEN_BUCKETS if tokens <= end), TOKEN_BUCKETS[-1])


def kept_bucket(kept: int) -> int:
    """Return the smallest power of two, or one and a half of one, not below `kept`."""
    power = 1 << max(kept - 1, 0).bit_length()
    return 3 * power // 4 if kept <= 3 * power // 4 else power


def table_path(device: str) -> Path:
    """Return the path of the table of a device or architecture, whether or not it exists."""
    return TABLES / f"{re.sub(r'[^A-Za-z0-9]+', '_', device).strip('_')}.json"


def save_table(table: Table, path: Path) -> None:
    """Write a table as JSON."""
    path.write_text(json.dumps(asdict(table), indent=1) + "\n")


def read_table(path: Path) -> Table:
    """Read a table."""
    raw = json.loads(path.read_text())
    entries = []
    for entry in raw["entries"]:
        tile = entry.pop("tile")
        entries.append(
            Entry(tile=Tile(HiddenTile(**tile["hidden"]), DownTile(**tile["down"])), **entry)
        )
    return Table(raw["device"], raw["measured"], tuple(entries))


@functools.cache
def load_table(device: str) -> Table:
    """Return the table of a device or architecture, which is read once."""
    return read_table(table_path(device))


@functools.cache
def table_for(device: torch.device) -> Table:
    """Return the table of a GPU: its own, else its architecture's, else the fallback."""
    names = []
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        names.append(properties.name)
        if torch.version.hip:
            names.append(properties.gcnArchName.split(":")[0])
        else:
            names.append(f"sm_{properties.major}{properties.minor}")
    return load_table(next((name for name in names if table_path(name).exists()), FALLBACK))


@functools.cache
def compute_units(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
