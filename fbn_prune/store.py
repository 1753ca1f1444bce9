"""What a run has finished, kept beside its output until that stands: the same command goes on from there.

A work directory holds a folder for each unfinished run, named by a fingerprint of all that decides the run's result:
recipe, checkpoint (headers, sizes and times of its files), versions, device, threads. In it lie the finished stages,
each a safetensors or JSON file, put in place whole and recorded with its SHA-256; what does not match its record is
computed again. Tensors are kept as they were computed, so that a resumed run ends in the same bytes as an undisturbed
one. The output's shards lie there too, until all are finished and the output gets them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fbn_prune import distributed
from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.export.shards import Put
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.pruning.cutting import FinishedLayer

FORMAT = 2
RECORD = "work.json"
LOCK = "lock"

KINDS = {"layers": "layer-", "matched layers": "match-", "shards": "shard-"}
"""What there are many of in a run, and what the names of their files begin with; all others are stages."""


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
            before = read_record(folder)
            if before is not None:
                self._record = before

    @property
    def started(self) -> bool:
        """Whether there is a finished stage to go on from."""
        return self._folder is not None and bool(self._record["stages"])

    @property
    def words(self) -> str:
        """What there is to go on from."""
        found = [
            f"{count} {kind}" for kind, count in counted(self._record["stages"]).items() if count
        ]
        return f"{', '.join(found)} finished before ({self._folder})"

    def tidy(self) -> None:
        """Remove files that the record does not name: a killed run's, half written, or what has been replaced."""
        if self._folder is not None:
            for file in self._folder.iterdir():
                if file.name not in {RECORD, LOCK, *self._record["stages"]}:
                    with suppress(OSError):
                        file.unlink()

    def bind(self, calibration: str) -> bool:
        """Say what the calibration text is; what was finished on another is forgotten. Whether that was so."""
        before = self._record.get("calibration")
        if before == calibration:
            return False
        stale = bool(self._record["stages"])
        self._record |= {"calibration": calibration, "stages": {}}
        self._save_record()
        self.tidy()
        return stale

    def numbers(self, stage: str, compute: Callable[[], Any]) -> Any:
        """A stage whose result is JSON: as kept, or computed and kept."""
        data = self._load(f"{stage}.json")
        if data is not None:
            return json.loads(data)
        value = compute()
        self._save(f"{stage}.json", lambda put: put(json.dumps(value).encode()))
        return value

    def tensors(self, stage: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """A stage whose result is tensors; kept ones come back on the CPU."""
        data = self._load(f"{stage}.safetensors")
        if data is not None:
            return safetensors.torch.load(data)
        value = compute()
        self._save(f"{stage}.safetensors", lambda put: put(_packed(value)))
        return value

    def state(self, stage: str) -> dict[str, Tensor] | None:
        """The last state that a stage kept on its way, on the CPU; None where there is none."""
        kept = (self._read(name) for name in sorted(self._named(f"{stage}-"), reverse=True))
        data = distributed.broadcast(next((data for data in kept if data is not None), None))
        return None if data is None else safetensors.torch.load(data)

    def keep_state(self, stage: str, number: int, compute: Callable[[], dict[str, Tensor]]) -> None:
        """Keep a stage's state, higher in number than those before, in their place.

        Of several processes the first decides when: the others need not call.
        """
        self._save(
            f"{stage}-{number:08d}.safetensors",
            lambda put: put(_packed(compute())),
            instead_of=self._named(f"{stage}-"),
        )

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
        self._save(name, lambda put: put(value.to_bytes()))
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
        self._save(_layer_file(layer), lambda put: put(finished.to_bytes()))

    # Shards (fbn_prune.export.shards.ShardStore): too large to be read whole, and the first process's alone.

    def only_shards(self, names: Collection[str]) -> None:
        """Let go of all shards but these, which a run with another shard size has left."""
        wanted = {KINDS["shards"] + name for name in names}
        for name in self._named(KINDS["shards"]):
            if name not in wanted:
                del self._record["stages"][name]
        self.tidy()

    def has_shard(self, name: str, head: bytes, size: int) -> bool:
        """Whether that shard is kept and undamaged, starts with `head` and is of `size` bytes."""
        expected = self._record["stages"].get(KINDS["shards"] + name)
        if expected is None:
            return False
        try:
            with self._shard(name).open("rb") as file:
                start = file.read(len(head))
                if start != head or os.fstat(file.fileno()).st_size != size:
                    return False
                digest = hashlib.sha256(start)
                while chunk := file.read(2**20):
                    digest.update(chunk)
        except OSError:
            return False
        return digest.hexdigest() == expected

    def keep_shard(self, name: str, write: Callable[[Put], object]) -> None:
        """Keep what `write` puts, when all of it is on the disk."""
        with suppress(OSError):  # what is there is damaged, and takes room
            self._shard(name).unlink()
        self._save(KINDS["shards"] + name, write)

    def put_shard(self, name: str, target: Path) -> None:
        """Have a kept shard at `target` too: the same file by a second name where the file system knows such names, so
        that nothing is lost if the run is killed before the output stands; else moved there, or from another file
        system copied.

        Raises
        ------
        FbnPruneError
            There is no room for a copy.
        """
        for put in (os.link, os.rename):
            with suppress(OSError):
                put(self._shard(name), target)
                return
        try:
            shutil.copyfile(self._shard(name), target)
        except OSError as error:
            raise _unwritable(target.parent, error) from error

    def _shard(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / (KINDS["shards"] + name)

    def _named(self, start: str) -> list[str]:
        """Names of what is kept that begin so."""
        return [name for name in self._record["stages"] if name.startswith(start)]

    def _load(self, name: str) -> bytes | None:
        # Of several processes the first reads and the others are told, or they would not do the same stages.
        return distributed.broadcast(self._read(name))

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

    def _save(
        self, name: str, write: Callable[[Put], object], *, instead_of: Iterable[str] = ()
    ) -> None:
        """Keep what `write` puts, and no longer what it stands for."""
        if self._folder is None:
            return
        if not name.startswith(KINDS["shards"]):
            # Shards hold what the stages before them came to: a stage done again might come to something else.
            instead_of = {*instead_of, *self._named(KINDS["shards"])}
        stages = self._record["stages"]
        stages[name] = self._write(name, write)
        gone = [old for old in instead_of if old != name and stages.pop(old, None) is not None]
        self._save_record()
        if gone:
            self.tidy()

    def _save_record(self) -> None:
        if self._folder is not None:
            self._write(RECORD, lambda put: put(json.dumps(self._record, indent=1).encode()))

    def _write(self, name: str, write: Callable[[Put], object]) -> str:
        """Write a file and put it in place when it is on the disk; its SHA-256."""
        assert self._folder is not None
        temporary = self._folder / f"{name}.tmp"
        digest = hashlib.sha256()
        try:
            with temporary.open("wb") as file:

                def put(data: bytes | memoryview) -> None:
                    digest.update(data)
                    file.write(data)

                write(put)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._folder / name)
        except BaseException as error:
            with suppress(OSError):
                temporary.unlink()
            if isinstance(error, OSError):
                raise _unwritable(self._folder, error) from error
            raise
        return digest.hexdigest()


def counted(names: Collection[str]) -> dict[str, int]:
    """How many stages, and how many of each of :data:`KINDS`, these names of kept files are."""
    kinds = {kind: sum(name.startswith(start) for name in names) for kind, start in KINDS.items()}
    return {"stages": len(names) - sum(kinds.values()), **kinds}


def _unwritable(folder: Path, error: OSError) -> FbnPruneError:
    return FbnPruneError(
        f"cannot write {folder}: {error.strerror or error}; what is finished is kept: make room, or "
        "repair what is wrong, and run the same command again"
    )


def _packed(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({k: t.detach().cpu().contiguous() for k, t in tensors.items()})


def _layer_file(layer: int) -> str:
    return f"layer-{layer:05d}.safetensors"


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a run's folder says of itself; None where it is damaged, or of another version."""
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
        work.tidy()
        try:
            yield work
        except BaseException as error:
            if isinstance(error, InvalidInput) or not work.started:
                remove(folder, place, keep_place)
                for parent in made:
                    with suppress(OSError):
                        parent.rmdir()
            else:
                error.resumes = True  # type: ignore[attr-defined]
            raise
        remove(folder, place, keep_place)


def remove(folder: Path, place: Path, keep_place: bool) -> None:
    """Remove a run's folder from a work directory, and that too if nothing else is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    if not keep_place:
        with suppress(OSError):
            place.rmdir()


# Locks that a dead process cannot leave behind: the kernel lets go of them when it ends, however it ends.

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
"""What file systems say that know no locks; there nobody is kept out."""


def try_lock(handle: int) -> bool:
    """Lock an open file or folder for this process; False where another one has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def owned(path: Path) -> bool:
    """Whether a process holds the lock of a file or folder."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not try_lock(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path, name: str, otherwise: str) -> Iterator[None]:
    """Make a folder if need be and hold the lock of the file `name` in it; it says which process does.

    Raises
    ------
    InvalidInput
        Another process holds it; the line ends with `otherwise`.
    FbnPruneError
        The folder cannot be made or written to.
    """
    try:
        handle = _open(folder, name, otherwise)
    except OSError as error:
        raise FbnPruneError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        os.truncate(handle, 0)
        with suppress(OSError):  # a full disk must not keep a run from saying so itself
            os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)


def _open(folder: Path, name: str, otherwise: str) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        if not try_lock(handle):
            owner = os.read(handle, 32).decode("ascii", "replace").strip()
            os.close(handle)
            raise InvalidInput(f"{folder} is in use by process {owner}: {otherwise}")
        # Between opening and locking, the process that had it may have removed the folder.
        with suppress(OSError):
            if os.stat(folder / name).st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)
