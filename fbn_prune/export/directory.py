"""Check an output folder before any work, and put it in place only when it is complete."""

from __future__ import annotations

import glob
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.store import owned, try_lock

logger = logging.getLogger(__name__)


def check_output(output: Path, overwrite: bool, source: Path | None, needed_bytes: int = 0) -> None:
    """Refuse, before any work, an output folder that cannot be written at the end.

    Parameters
    ----------
    output
        The output folder.
    overwrite
        Allow an existing folder, unless it is or contains the model's folder, the working folder or the home folder.
    source
        The model's folder; None if it does not matter.
    needed_bytes
        The expected size of the output.

    Raises
    ------
    InvalidInput
        The output is a file, a mount point, a folder that must not be replaced, not writable or too large for its disk.
    """
    target = output.expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise InvalidInput(f"the output {output} is a file; give a folder that does not exist yet")
    if source is not None and _holds(target, source.resolve()):
        raise InvalidInput(f"the output {output} is or holds the model itself; give another folder")
    if any(_holds(target, precious) for precious in (Path.cwd(), Path(os.path.expanduser("~")))):
        raise InvalidInput(
            f"the output {output} is or holds the working or home folder; give another folder"
        )
    if os.path.ismount(target):
        raise InvalidInput(f"the output {output} is a mount point; give a folder inside it")
    if target.is_dir() and not overwrite:
        raise InvalidInput(f"the output {output} exists; give another, or --overwrite")
    ancestor = next(parent for parent in target.parents if parent.exists())
    try:  # permissions are not enough: the file system may be read-only, or refuse root
        with tempfile.TemporaryDirectory(dir=ancestor, prefix=".fbn-prune-"):
            pass
    except OSError as error:
        raise InvalidInput(
            f"the output {output} cannot be made: {ancestor} is not writable ({error.strerror}); "
            "give a folder elsewhere"
        ) from error
    check_room(output, needed_bytes, "output", left=_leftover_bytes(target))


def check_room(place: Path, needed_bytes: int, what: str, *, left: int = 0) -> None:
    """Refuse a place whose disk has too little free space.

    Parameters
    ----------
    place
        A file or folder, which need not exist yet.
    needed_bytes
        The space that will be needed.
    what
        What will be written there, for the message.
    left
        Bytes that will be freed on the disk before anything is written.

    Raises
    ------
    InvalidInput
        There are fewer than `needed_bytes` bytes free.
    """
    ancestor = _existing(place)
    free = shutil.disk_usage(ancestor).free + left
    if free < needed_bytes:
        needs, has = _size(needed_bytes), _size(free)
        if needs == has:  # too close to differ when rounded
            needs, has = f"{needed_bytes:,} bytes", f"{free:,} bytes"
        raise InvalidInput(
            f"the {what} {place} needs {needs}, but {ancestor} has {has} free: "
            "make room there, or give a place on another disk"
        )


def _size(count: int) -> str:
    """Return a number of bytes in the unit in which it has digits before the point."""
    units = ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)
    return next(
        (f"{count / unit:.1f} {name}" for name, unit in units if count >= unit), f"{count} bytes"
    )


def on_one_disk(one: Path, other: Path) -> bool:
    """Return whether two places, which need not exist yet, are on the same file system."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def _existing(place: Path) -> Path:
    """Return the place itself if it exists, or the nearest existing folder above it."""
    target = place.expanduser().resolve()
    return next(folder for folder in (target, *target.parents) if folder.exists())


def _leftover_bytes(target: Path) -> int:
    """Return the bytes of leftovers of killed runs, which the next run removes; hard-linked files free nothing."""
    found = 0
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        if not owned(leftover):
            with suppress(OSError):
                stats = [file.stat() for file in leftover.rglob("*")]
                found += sum(stat.st_size for stat in stats if stat.st_nlink == 1)
    return found


def _holds(folder: Path, inner: Path) -> bool:
    return inner == folder or folder in inner.parents


@contextmanager
def atomic_directory(output: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden folder beside `output`, which is renamed to `output` when the block ends without an exception.

    Any exception, including KeyboardInterrupt, removes the hidden folder and the parent folders created for it, and
    leaves an existing output unchanged.

    Parameters
    ----------
    output
        The output folder.
    overwrite
        Replace an existing output at the end.

    Raises
    ------
    FbnPruneError
        The folder cannot be created or renamed, or `output` appeared in the meantime.
    """
    target = output.expanduser().resolve()
    created = [parent for parent in target.parents if not parent.exists()]
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    handle: int | None = None
    try:
        with disk_errors(output):
            _clear(target, "partial")
            handle = _own(partial)
        yield partial
        with disk_errors(output):
            _flush(partial)
            _put_in_place(partial, target, overwrite)
            _clear(target, "old")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in created:
            with suppress(OSError):
                parent.rmdir()
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _own(partial: Path) -> int:
    """Create the folder and hold its lock, so that other runs do not take it for a leftover of a killed run."""
    while True:
        partial.mkdir(parents=True)
        try:
            handle = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:  # another run took it for a leftover before it was locked
            continue
        if try_lock(handle) and partial.exists():
            return handle
        os.close(handle)


def _clear(target: Path, kind: str) -> None:
    """Delete unlocked leftovers of killed runs: unfinished outputs ("partial") or replaced ones ("old")."""
    beside = f".{glob.escape(target.name)}.*."
    if kind == "old" and any(owned(other) for other in target.parent.glob(f"{beside}partial")):
        return  # that run may be about to restore an old one
    for leftover in sorted(target.parent.glob(f"{beside}{kind}")):
        if not owned(leftover):
            logger.info("removing %s, left by a run that was killed", leftover)
            shutil.rmtree(leftover, ignore_errors=True)


def _put_in_place(partial: Path, target: Path, overwrite: bool) -> None:
    """Rename the folder; an existing output that is not empty is moved aside first."""
    if not (target.exists() and any(target.iterdir())):
        partial.rename(target)
        _flush_folder(target.parent)
        return
    if not overwrite:
        raise FbnPruneError(
            f"the output {target} appeared during the run; it is left as it is: run the same command again with "
            "--overwrite to replace it (finished stages are kept), or give another --output"
        )
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    target.rename(aside)
    try:
        partial.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    _flush_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
    if aside.exists():
        logger.warning("the replaced output could not be removed: delete %s", aside)


def _flush(directory: Path) -> None:
    """Flush all files to disk, so that after a power failure a renamed folder holds complete files."""
    for folder, _, files in os.walk(directory):
        for file in files:
            with open(Path(folder, file), "rb") as handle:
                os.fsync(handle.fileno())
        _flush_folder(Path(folder))


def _flush_folder(folder: Path) -> None:
    with suppress(
        OSError
    ):  # some systems and network file systems do not support fsync of a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Turn an OSError, for example of a full disk, into a one-line error that names `directory`."""
    try:
        yield
    except OSError as error:
        raise FbnPruneError(f"cannot write {directory}: {error.strerror or error}") from error
