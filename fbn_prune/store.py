"""Storage of the finished parts of a run, so that the same command can continue after a failure.

A work directory holds one folder per unfinished run. The folder's name is a fingerprint of everything that decides the
run's result. It contains the finished parts (files) and a record with the SHA-256 of each. A part is written under a
temporary name and then renamed; a part that does not match its hash is computed again. Callers encode values without
loss, so a resumed run writes the same bytes as an uninterrupted one. The folder is removed when the output is written.
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

FORMAT = 5
RECORD = "work.json"
LOCK = "lock"

LAYERS, MATCHED_LAYERS, SHARDS, WRITTEN = "layer-", "match-", "shard-", "written-"
KINDS = {"layers": LAYERS, "matched layers": MATCHED_LAYERS, "shards": SHARDS, "texts": WRITTEN}
"""Kinds of parts that a run has many of, and the prefix of their names. All other parts are stages."""

Put = Callable[[bytes | memoryview], object]
"""A function that appends bytes to a file."""

Value = TypeVar("Value")


def default_place(output: Path) -> Path:
    """Return the default work directory of a run: `.NAME.work` beside the output `NAME`."""
    target = output.expanduser().resolve()
    return target.with_name(f".{target.name}.work")


def fingerprint(facts: dict[str, Any]) -> str:
    """Return a hash of these facts, 16 hexadecimal digits; names the folder of a run."""
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """The finished parts of one run, by name. A store without a folder keeps nothing.

    In a job of several processes only rank 0 has a folder.

    Parameters
    ----------
    folder
        Existing folder of the run. Default: nothing is kept.
    about
        Facts that `fbn-prune work list` shows about the run.
    """

    def __init__(self, folder: Path | None = None, about: dict[str, Any] | None = None) -> None:
        self._folder = folder
        self._record: dict[str, Any] = {"format": FORMAT, **(about or {}), "stages": {}}
        if folder is not None:
            self._record = read_record(folder) or self._record

    @property
    def started(self) -> bool:
        """Whether the run has a finished part that was made from its text."""
        return len(self.names("")) > len(self.names(WRITTEN))

    @property
    def words(self) -> str:
        """One line that counts the finished parts."""
        found = [
            f"{count} {kind}" for kind, count in counted(self._record["stages"]).items() if count
        ]
        return f"{', '.join(found)} finished before ({self._folder})"

    def tidy(self) -> None:
        """Remove files that the record does not list: incomplete ones of a killed run, and replaced parts."""
        if self._folder is not None:
            for file in self._folder.iterdir():
                if file.name not in {RECORD, LOCK, *self._record["stages"]}:
                    with suppress(OSError):
                        file.unlink()

    def bind(self, calibration: str) -> bool:
        """Record the fingerprint of the text, and drop parts made from another; text that the model wrote stays.

        Returns
        -------
        bool
            Whether parts were dropped.
        """
        before = self._record.get("calibration")
        if before == calibration:
            return False
        stale = self.started
        written = {name: self._record["stages"][name] for name in self.names(WRITTEN)}
        self._record |= {"calibration": calibration, "stages": written}
        self._save_record()
        self.tidy()
        return stale

    def names(self, prefix: str) -> list[str]:
        """Return the sorted names of this process's parts that begin with `prefix`."""
        return sorted(name for name in self._record["stages"] if name.startswith(prefix))

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a part, or None if it is missing or damaged.

        All processes must call this; rank 0 reads and broadcasts, so that all continue from the same part.
        """
        return distributed.broadcast(self._read(name))

    def read_last(self, prefix: str) -> bytes | None:
        """Return the last undamaged part, in order of names, that begins with `prefix`; see :meth:`read`."""
        found = (self._read(name) for name in reversed(self.names(prefix)))
        return distributed.broadcast(next((data for data in found if data is not None), None))

    def write(
        self, name: str, write: Callable[[Put], object], *, replaces: Iterable[str] = ()
    ) -> None:
        """Write a part and record it when it is completely on disk; does nothing in a store without a folder.

        Parameters
        ----------
        name, write
            File name of the part; called with a function that appends bytes to it.
        replaces
            Names of parts to remove at the same time.

        Raises
        ------
        FbnPruneError
            If the folder cannot be written to.
        """
        if self._folder is None:
            return
        if not name.startswith(SHARDS):
            # Shards are made from the other parts, so a new part makes them out of date.
            replaces = {*replaces, *self.names(SHARDS)}
        with suppress(OSError):  # free the space of a damaged part
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
        """Return a part's value: decoded if stored, otherwise computed and stored. All processes must call this."""
        data = self.read(name)
        if data is not None:
            return decode(data)
        value = compute()
        self.write(name, lambda put: put(encode(value)))
        return value

    # For shards, which are too large to read at once and which only rank 0 handles.

    def keep_only(self, prefix: str, names: Collection[str]) -> None:
        """Remove the parts that begin with `prefix` and are not in `names`."""
        if others := set(self.names(prefix)) - set(names):
            self._save_record(without=others)

    def holds(self, name: str, head: bytes, size: int) -> bool:
        """Return whether a part is stored and undamaged, starts with `head` and has `size` bytes."""
        expected = self._record["stages"].get(name)
        if self._folder is None or expected is None:
            return False
        with suppress(OSError), (self._folder / name).open("rb") as file:
            start = file.read(len(head))
            if start == head and os.fstat(file.fileno()).st_size == size:
                digest = hashlib.sha256(start)
                while chunk := file.read(2**20):
                    digest.update(chunk)
                return bool(digest.hexdigest() == expected)
        return False

    def put(self, name: str, target: Path) -> None:
        """Place a part at `target`: by hard link, else by moving it, else (on another file system) by copying it.

        A hard link keeps the part in the store in case the run is killed before the output is complete.

        Raises
        ------
        FbnPruneError
            If the disk has no room for a copy.
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
        """Write a file, rename it into place once it is on disk, and return its SHA-256."""
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
    """Count the stages among these names of parts, and the parts of each of :data:`KINDS`."""
    kinds = {kind: sum(name.startswith(start) for name in names) for kind, start in KINDS.items()}
    return {"stages": len(names) - sum(kinds.values()), **kinds}


def _unwritable(folder: Path, error: OSError) -> FbnPruneError:
    return FbnPruneError(
        f"cannot write {folder}: {error.strerror or error}; finished stages are kept: free disk space or "
        "fix the cause, and run the same command again"
    )


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record in a run's folder, or None if it is damaged or has another format version."""
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
    """Open the store of one run and lock it for this process.

    The run's folder is removed when the block succeeds, and also when it fails without a finished part or with
    invalid input, because then it would not help the next attempt.

    Parameters
    ----------
    place, key
        Work directory, and the fingerprint of the run.
    about
        Facts that `fbn-prune work list` shows about the run.
    keep_place
        Do not remove `place` when it becomes empty.

    Raises
    ------
    InvalidInput
        If another process works on the same run.
    FbnPruneError
        If the folder cannot be written to.
    """
    folder = place / key
    made = [parent for parent in place.resolve().parents if not parent.exists()]
    with locked(folder, LOCK, "the same run is in progress; wait until it ends"):
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
    """Remove a run's folder, and then the work directory if nothing else is in it (unless `keep_place`)."""
    shutil.rmtree(folder, ignore_errors=True)
    if not keep_place:
        with suppress(OSError):
            if not owned(place / LOCK):  # left by a run that was killed
                (place / LOCK).unlink(missing_ok=True)
            place.rmdir()


# The kernel releases these locks when the process ends for any reason, so none can be left behind.

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
"""Errors of file systems without locks; there a run is not protected from a second one."""


def try_lock(handle: int) -> bool:
    """Lock an open file or folder for this process; return False if another process holds the lock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def owned(path: Path) -> bool:
    """Return whether a process holds the lock of a file or folder."""
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
    """Create a folder if necessary and hold the lock of a file in it.

    Parameters
    ----------
    folder, name
        The folder, and the name of the lock file, which holds the process id.
    otherwise
        Advice that ends the message if another process holds the lock.

    Raises
    ------
    InvalidInput
        If another process holds the lock.
    FbnPruneError
        If the folder cannot be created or written to.
    """
    try:
        handle = _open(folder, name, otherwise)
    except OSError as error:
        raise FbnPruneError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        os.truncate(handle, 0)
        with suppress(OSError):  # the run itself reports a full disk with more context
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
        # The previous owner may have removed the folder after we opened the file: then try again.
        with suppress(OSError):
            if os.stat(folder / name).st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)
