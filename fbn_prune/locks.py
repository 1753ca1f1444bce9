"""Locks that a dead process cannot leave behind: the kernel lets go of them when it ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fbn_prune.errors import FbnPruneError, InvalidInput

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
