"""A store of bytes beside a run's output: what the run has finished, until the output stands.

A work directory holds a folder for each unfinished run, named by a fingerprint of all that decides the run's result.
In it lie finished parts, each put in place whole and recorded with its SHA-256: the same command goes on from them, and
what does not match its record is made again. Callers turn their values into bytes and back without loss, so that a
resumed run ends in the same bytes as an undisturbed one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fbn_prune import distributed
from fbn_prune.errors import FbnPruneError, InvalidInput

FORMAT = 3
RECORD = "work.json"
LOCK = "lock"

LAYERS, MATCHED_LAYERS, SHARDS = "layer-", "match-", "shard-"
KINDS = {"layers": LAYERS, "matched layers": MATCHED_LAYERS, "shards": SHARDS}
"""What there are many of in a run, and what their names begin with; all others are stages."""

Put = Callable[[bytes | memoryview], object]
"""Takes the next bytes of a file."""

Value = TypeVar("Value")


def default_place(output: Path) -> Path:
    """The work directory of a run that names none: hidden, beside its output."""
    target = output.expanduser().resolve()
    return target.with_name(f".{target.name}.work")


def fingerprint(facts: dict[str, Any]) -> str:
    """Name of the folder of the run that these facts decide."""
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """Finished parts of one run, by name; without a folder nothing is kept, and every part is made.

    Of several processes on one job the first has the folder, and the others have stores without one.

    Parameters
    ----------
    folder
        The run's own folder, which exists.
    about
        What a listing of unfinished runs says of this one.
    """

    def __init__(self, folder: Path | None = None, about: dict[str, Any] | None = None) -> None:
        self._folder = folder
        self._record: dict[str, Any] = {"format": FORMAT, **(about or {}), "stages": {}}
        if folder is not None:
            self._record = read_record(folder) or self._record

    @property
    def started(self) -> bool:
        """Whether there is a finished part to go on from."""
        return bool(self._record["stages"])

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
        """Record the calibration text's fingerprint, and forget what was made from another text.

        Returns
        -------
        bool
            Whether anything was forgotten.
        """
        before = self._record.get("calibration")
        if before == calibration:
            return False
        stale = self.started
        self._record |= {"calibration": calibration, "stages": {}}
        self._save_record()
        self.tidy()
        return stale

    def names(self, prefix: str) -> list[str]:
        """Names of this process's parts that begin with `prefix`, in order."""
        return sorted(name for name in self._record["stages"] if name.startswith(prefix))

    def read(self, name: str) -> bytes | None:
        """A part as it was written; None where there is none, or where it is damaged.

        All processes call it and get what the first one finds, so that all go on from the same place.
        """
        return distributed.broadcast(self._read(name))

    def read_last(self, prefix: str) -> bytes | None:
        """The last undamaged part, by name, that begins with `prefix`; otherwise as :meth:`read`."""
        found = (self._read(name) for name in reversed(self.names(prefix)))
        return distributed.broadcast(next((data for data in found if data is not None), None))

    def write(
        self, name: str, write: Callable[[Put], object], *, replaces: Iterable[str] = ()
    ) -> None:
        """Keep what `write` puts, once all of it is on the disk. It is not called where nothing is kept.

        Parameters
        ----------
        replaces
            Names of parts that are forgotten in the same moment.

        Raises
        ------
        FbnPruneError
            The folder cannot be written to.
        """
        if self._folder is None:
            return
        if not name.startswith(SHARDS):
            # Shards are made from the parts before them, and a part made again may differ.
            replaces = {*replaces, *self.names(SHARDS)}
        with suppress(OSError):  # what is there is damaged, and takes room
            (self._folder / name).unlink()
        self._record["stages"][name] = self._write(name, write)
        self._save_record(without=set(replaces) - {name})

    def kept(
        self,
        name: str,
        compute: Callable[[], Value],
        encode: Callable[[Value], bytes],
        decode: Callable[[bytes], Value],
    ) -> Value:
        """A part's value: decoded where it was kept, otherwise computed and kept. All processes call it."""
        data = self.read(name)
        if data is not None:
            return decode(data)
        value = compute()
        self.write(name, lambda put: put(encode(value)))
        return value

    # Shards: too large to be read whole, and the first process's alone.

    def keep_only(self, prefix: str, names: Collection[str]) -> None:
        """Forget the parts that begin with `prefix` and are not among `names`."""
        if others := set(self.names(prefix)) - set(names):
            self._save_record(without=others)

    def holds(self, name: str, head: bytes, size: int) -> bool:
        """Whether a part is kept and undamaged, starts with `head` and has `size` bytes."""
        expected = self._record["stages"].get(name)
        if self._folder is None or expected is None:
            return False
        with suppress(OSError), (self._folder / name).open("rb") as file:
            start = file.read(len(head))
            if start == head and os.fstat(file.fileno()).st_size == size:
                digest = hashlib.sha256(start)
                while chunk := file.read(2**20):
                    digest.update(chunk)
                return digest.hexdigest() == expected
        return False

    def put(self, name: str, target: Path) -> None:
        """Have a part at `target` too: by a hard link where the file system has them, so that nothing is lost if the
        run is killed before the output stands; else moved there, or copied from another file system.

        Raises
        ------
        FbnPruneError
            There is no room for a copy.
        """
        assert self._folder is not None
        for put in (os.link, os.rename):
            with suppress(OSError):
                put(self._folder / name, target)
                return
        try:
            shutil.copyfile(self._folder / name, target)
        except OSError as error:
            raise _unwritable(target.parent, error) from error

    def _read(self, name: str) -> bytes | None:
        expected = self._record["stages"].get(name)
        if self._folder is None or expected is None:
            return None
        try:
            data = (self._folder / name).read_bytes()
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == expected else None

    def _save_record(self, *, without: Collection[str] = ()) -> None:
        """Save the record without these parts, then remove their files."""
        gone = [name for name in without if self._record["stages"].pop(name, None) is not None]
        if self._folder is not None:
            self._write(RECORD, lambda put: put(json.dumps(self._record, indent=1).encode()))
            if gone:
                self.tidy()

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
    """How many stages, and how many of each of :data:`KINDS`, these names of parts are."""
    kinds = {kind: sum(name.startswith(start) for name in names) for kind, start in KINDS.items()}
    return {"stages": len(names) - sum(kinds.values()), **kinds}


def _unwritable(folder: Path, error: OSError) -> FbnPruneError:
    return FbnPruneError(
        f"cannot write {folder}: {error.strerror or error}; what is finished is kept: make room, or "
        "repair what is wrong, and run the same command again"
    )


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a run's folder says of itself; None where it is damaged, or of another version."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    usable = isinstance(record, dict) and record.get("format") == FORMAT
    return record if usable and isinstance(record.get("stages"), dict) else None


@contextmanager
def store_in(
    place: Path, key: str, about: dict[str, Any], *, keep_place: bool = False
) -> Iterator[Store]:
    """The store of the run `key` in the work directory `place`; this process alone has it inside the block.

    The folder goes when the block ends well, or when nothing in it would help another run: where no part was
    finished, or the input was refused.

    Parameters
    ----------
    about
        What a listing says of the run.
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
        store = Store(folder, about)
        store.tidy()
        try:
            yield store
        except BaseException as error:
            if isinstance(error, InvalidInput) or not store.started:
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
