"""What unfinished runs have left in work directories (:mod:`fbn_prune.store`), listed and removed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fbn_prune.errors import InvalidInput
from fbn_prune.store import KINDS, LOCK, RECORD, counted, owned, read_record, remove


@dataclass(frozen=True)
class Unfinished:
    """A run's folder in a work directory."""

    folder: Path
    model: str
    output: str
    stages: int
    layers: int
    matched_layers: int
    shards: int
    bytes: int
    idle_seconds: float
    in_use: bool


def unfinished(where: Path) -> list[Unfinished]:
    """The runs in a work directory, or in the work directories beside the outputs in a folder.

    Raises
    ------
    InvalidInput
        `where` is no folder.
    """
    if not where.is_dir():
        raise InvalidInput(f"there is no folder {where}")
    found = []
    for record in sorted({*where.glob(f"*/{RECORD}"), *where.glob(f".*.work/*/{RECORD}")}):
        content = read_record(record.parent)
        if content is None:
            continue
        counts = counted(content["stages"])
        found.append(
            Unfinished(
                folder=record.parent,
                model=str(content.get("model")),
                output=str(content.get("output")),
                stages=counts["stages"],
                layers=counts["layers"],
                matched_layers=counts["matched layers"],
                shards=counts["shards"],
                bytes=_bytes(record.parent.iterdir()),
                idle_seconds=max(0.0, time.time() - record.stat().st_mtime),
                in_use=owned(record.parent / LOCK),
            )
        )
    return found


def clean(where: Path) -> tuple[list[Unfinished], list[Unfinished]]:
    """Remove the runs that :func:`unfinished` finds and no process is at work on: those removed, those left."""
    removed, left = [], []
    for run in unfinished(where):
        if run.in_use:
            left.append(run)
            continue
        remove(run.folder, run.folder.parent, keep_place=run.folder.parent == where)
        removed.append(run)
    return removed, left


def shard_bytes(place: Path, output: Path) -> int:
    """What the shards take that unfinished runs to this output have in a work directory: room that an output made from
    them does not need again."""
    target = str(output.expanduser().resolve())
    records = ((file.parent, read_record(file.parent)) for file in place.glob(f"*/{RECORD}"))
    folders = [folder for folder, record in records if record and record.get("output") == target]
    return sum(_bytes(folder.glob(f"{KINDS['shards']}*")) for folder in folders)


def _bytes(files: Iterable[Path]) -> int:
    """Of files that a run at work may be replacing."""
    size = 0
    for file in files:
        with suppress(OSError):
            size += file.stat().st_size
    return size
