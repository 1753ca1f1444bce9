"""List and remove the finished stages of unfinished runs in work directories (:mod:`fbn_prune.store`)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fbn_prune.errors import InvalidInput
from fbn_prune.store import KINDS, LOCK, RECORD, counted, owned, read_record, remove


@dataclass(frozen=True)
class UnfinishedRun:
    """The folder of an unfinished run: its recipe's model and output, its finished parts by kind, and their size.

    `idle_seconds` counts from the last finished part; `in_use` tells whether a process works on the run.
    """

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


def unfinished_runs(folder: Path) -> list[UnfinishedRun]:
    """Return the unfinished runs in a work directory, or in the default work directories of a folder's outputs.

    Raises
    ------
    InvalidInput
        If the folder does not exist.
    """
    if not folder.is_dir():
        raise InvalidInput(
            f"there is no folder {folder}: give one that holds outputs or work folders"
        )
    found = []
    for record in sorted({*folder.glob(f"*/{RECORD}"), *folder.glob(f".*.work/*/{RECORD}")}):
        content = read_record(record.parent)
        if content is None:
            continue
        counts = counted(content["stages"])
        found.append(
            UnfinishedRun(
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


def clean_runs(folder: Path) -> tuple[list[UnfinishedRun], list[UnfinishedRun]]:
    """Remove the unfinished runs that no process works on; parameter and errors as in :func:`unfinished_runs`.

    Returns
    -------
    removed, left
        The removed runs, and those in use.
    """
    removed, left = [], []
    for run in unfinished_runs(folder):
        if run.in_use:
            left.append(run)
            continue
        remove(run.folder, run.folder.parent, keep_place=run.folder.parent == folder)
        removed.append(run)
    return removed, left


def shard_bytes(place: Path, output: Path) -> int:
    """Return the bytes of the finished shards that unfinished runs to `output` have in the work directory `place`."""
    target = str(output.expanduser().resolve())
    records = ((file.parent, read_record(file.parent)) for file in place.glob(f"*/{RECORD}"))
    folders = [folder for folder, record in records if record and record.get("output") == target]
    return sum(_bytes(folder.glob(f"{KINDS['shards']}*")) for folder in folders)


def _bytes(files: Iterable[Path]) -> int:
    """Return the total size of files, some of which a running process may remove meanwhile."""
    size = 0
    for file in files:
        with suppress(OSError):
            size += file.stat().st_size
    return size
