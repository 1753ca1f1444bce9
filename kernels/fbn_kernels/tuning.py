"""Which tile sizes a call uses: JSON tables, one a device, written by the tuner and read once.

Nothing is tried out at run time. A table's entries are keyed by token bucket, kept bucket, model
width, dtype and kind of set; a key that is null fits everything, and the most specific entry wins.
A device without a table of its own takes the one of its architecture.
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
"""Upper ends of the token buckets; more tokens belong to the last."""

_HIGH = 128
_MOST_WARPS = 8

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
"""Whether Triton's interpreter runs the kernels, on CPU tensors, as Triton itself reads it."""

FALLBACK = "sm_80"
"""The table for a device that has neither its own nor one of its architecture."""


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
    """Tile of the down kernel; `split` None leaves the number of splits to the shape.

    With `fixup` the program that finishes a tile last adds the splits' parts up, else a kernel of
    its own does.
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
    """A tile and the calls it is for; None stands for any."""

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
        Where and how the tiles with a model width were timed; None if none was: entries for any
        width are starting points.
    entries
        The tiles.
    """

    device: str
    measured: dict[str, Any] | None
    entries: tuple[Entry, ...]

    def find(
        self, tokens: int, kept: int, model_width: int, dtype: torch.dtype, kind: Kind
    ) -> Tile:
        """Return the tile of the most specific entry that fits; a prefix lies as whole blocks do.

        Raises
        ------
        LookupError
            If no entry fits.
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

        Low tiles are those of a call of so many tokens. High ones are as many as a long call's.
        """
        tokens = min(rows, block_rows) if block_rows < _HIGH else max(rows, 2 * _HIGH)
        tile = self.find(tokens, kept, model_width, dtype, kind)
        return Tile(_with_rows(tile.hidden, block_rows), _with_rows(tile.down, block_rows))


def _with_rows(tile: _Part, block_rows: int) -> _Part:
    """Give a tile other rows, and a higher one more warps, so that no thread holds more of it."""
    warps = tile.warps * max(1, block_rows // tile.block_rows)
    return replace(tile, block_rows=block_rows, warps=min(warps, _MOST_WARPS))


def token_bucket(tokens: int) -> int:
    """Return the upper end of the bucket that `tokens` belongs to."""
    return next((end for end in TOKEN_BUCKETS if tokens <= end), TOKEN_BUCKETS[-1])


def kept_bucket(kept: int) -> int:
    """Return the smallest power of two, or one and a half of one, not below `kept`."""
    power = 1 << max(kept - 1, 0).bit_length()
    return 3 * power // 4 if kept <= 3 * power // 4 else power


def table_path(device: str) -> Path:
    """Return where the table of a device or architecture lies, whether or not it exists."""
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
    """Read the table of a device or architecture that has one; read once."""
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
    """Return how many multiprocessors a GPU has; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
