"""What a run has finished, kept beside its output until that stands: the same command goes on from there.

A work directory holds a folder for each unfinished run, named by a fingerprint of all that decides the run's result:
recipe, checkpoint (headers, sizes and times of its files), versions, device, threads. In it lie the finished stages,
each a safetensors or JSON file, put in place whole and recorded with its SHA-256; what does not match its record is
computed again. Tensors are kept as they were computed, so that a resumed run ends in the same bytes as an undisturbed
one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fbn_prune import ranks
from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.locks import locked, owned
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.pruning.pipeline import FinishedLayer

FORMAT = 1
RECORD = "work.json"
LOCK = "lock"


def default_place(output: Path) -> Path:
    """The work directory of a run that names none: hidden, beside its output."""
    target = output.expanduser().resolve()
    return target.with_name(f".{target.name}.work")


def fingerprint(facts: dict[str, Any]) -> str:
    """Name of the folder of the run that these facts decide."""
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Work:
    """Finished stages of one run; without a folder nothing is kept, and every stage is computed."""

    def __init__(self, folder: Path | None, told: dict[str, Any] | None = None) -> None:
        self._folder = folder
        self._record: dict[str, Any] = {"format": FORMAT, **(told or {}), "stages": {}}
        if folder is not None:
            before = _read_record(folder)
            if before is not None:
                self._record = before

    @property
    def started(self) -> bool:
        """Whether there is a finished stage to go on from."""
        return self._folder is not None and bool(self._record["stages"])

    @property
    def words(self) -> str:
        """What there is to go on from."""
        names = self._record["stages"]
        layers = sum(name.startswith("layer-") for name in names)
        return f"{len(names) - layers} stages and {layers} layers finished before ({self._folder})"

    def bind(self, calibration: str) -> bool:
        """Say what the calibration text is; what was finished on another is forgotten. Whether that was so."""
        before = self._record.get("calibration")
        if before == calibration:
            return False
        stale = bool(self._record["stages"])
        self._record |= {"calibration": calibration, "stages": {}}
        self._save_record()
        return stale

    def numbers(self, stage: str, compute: Callable[[], Any]) -> Any:
        """A stage whose result is JSON: as kept, or computed and kept."""
        data = self._load(f"{stage}.json")
        if data is not None:
            return json.loads(data)
        value = compute()
        self._save(f"{stage}.json", lambda: json.dumps(value).encode())
        return value

    def tensors(self, stage: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """A stage whose result is tensors; kept ones come back on the CPU."""
        data = self._load(f"{stage}.safetensors")
        if data is not None:
            return safetensors.torch.load(data)
        value = compute()
        self._save(f"{stage}.safetensors", lambda: _packed(value))
        return value

    def networks(self, compute: Callable[[], FunctionalNetworks]) -> FunctionalNetworks:
        """The networks, as their artifact."""
        name = "networks.safetensors"
        data = self._load(name)
        if data is not None:
            with tempfile.NamedTemporaryFile(suffix=f"-{name}") as file:
                file.write(data)
                file.flush()
                return FunctionalNetworks.load(file.name)
        value = compute()
        self._save(name, value.to_bytes)
        return value

    def layers(self) -> int:
        """How many layers, from the first on, are finished."""
        count = 0
        while self._load(_layer_file(count)) is not None:
            count += 1
        return count

    def layer(self, layer: int) -> FinishedLayer:
        """A finished layer.

        Raises
        ------
        FbnPruneError
            Its file has been damaged since :meth:`layers` counted it.
        """
        data = self._load(_layer_file(layer))
        if data is None:
            raise FbnPruneError(f"{self._folder} changed during the run: start it again")
        return FinishedLayer.from_bytes(data)

    def keep(self, layer: int, finished: FinishedLayer) -> None:
        """Keep a layer that is finished."""
        self._save(_layer_file(layer), finished.to_bytes)

    def _load(self, name: str) -> bytes | None:
        # Of several processes the first reads and the others are told, or they would not do the same stages.
        return ranks.told(self._read(name))

    def _read(self, name: str) -> bytes | None:
        expected = self._record["stages"].get(name)
        if self._folder is None or expected is None:
            return None
        try:
            data = (self._folder / name).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != expected:
            return None
        return data

    def _save(self, name: str, pack: Callable[[], bytes]) -> None:
        if self._folder is None:
            return
        data = pack()
        self._write(name, data)
        self._record["stages"][name] = hashlib.sha256(data).hexdigest()
        self._save_record()

    def _save_record(self) -> None:
        if self._folder is not None:
            self._write(RECORD, json.dumps(self._record, indent=1).encode())

    def _write(self, name: str, data: bytes) -> None:
        assert self._folder is not None
        temporary = self._folder / f"{name}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._folder / name)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise FbnPruneError(
                f"cannot write {self._folder}: {error.strerror or error}; what is finished is kept: make room, or "
                "repair what is wrong, and run the same command again"
            ) from error


def _packed(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({k: t.detach().cpu().contiguous() for k, t in tensors.items()})


def _layer_file(layer: int) -> str:
    return f"layer-{layer:05d}.safetensors"


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    usable = isinstance(record, dict) and record.get("format") == FORMAT
    return record if usable and isinstance(record.get("stages"), dict) else None


@contextmanager
def work_in(
    place: Path, key: str, told: dict[str, Any], *, keep_place: bool = False
) -> Iterator[Work]:
    """The work of the run `key` in the work directory `place`; this process alone has it inside the block.

    The folder goes when the block ends well, or when nothing in it would help another run: where no stage was
    finished, or the input was refused.

    Parameters
    ----------
    told
        What a listing should say of the run.
    keep_place
        Leave `place` itself when it is empty.

    Raises
    ------
    InvalidInput
        Another process is at work on the same run.
    FbnPruneError
        The folder cannot be written to.
    """
    folder = place / key
    made = [parent for parent in place.resolve().parents if not parent.exists()]
    with locked(folder, LOCK, "the same run is at work there: wait for it to end"):
        work = Work(folder, told)
        try:
            yield work
        except BaseException as error:
            if isinstance(error, InvalidInput) or not work.started:
                _remove(folder, place, keep_place)
                for parent in made:
                    with suppress(OSError):
                        parent.rmdir()
            else:
                error.resumes = True  # type: ignore[attr-defined]
            raise
        _remove(folder, place, keep_place)


def _remove(folder: Path, place: Path, keep_place: bool) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if not keep_place:
        with suppress(OSError):
            place.rmdir()


# Listing and cleaning


@dataclass(frozen=True)
class Unfinished:
    """A run's folder in a work directory."""

    folder: Path
    model: str
    output: str
    stages: int
    layers: int
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
        content = _read_record(record.parent)
        if content is None:
            continue
        names = list(content["stages"])
        found.append(
            Unfinished(
                folder=record.parent,
                model=str(content.get("model")),
                output=str(content.get("output")),
                stages=sum(not name.startswith("layer-") for name in names),
                layers=sum(name.startswith("layer-") for name in names),
                bytes=sum(file.stat().st_size for file in record.parent.iterdir()),
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
        _remove(run.folder, run.folder.parent, keep_place=run.folder.parent == where)
        removed.append(run)
    return removed, left
