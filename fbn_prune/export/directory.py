"""The output folder: refused early if it could not be written, and in place only when it is whole."""

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
    """Refuse, before any work, an output that could not be written at the end.

    `overwrite` allows to replace an existing folder, except the model's own, one that holds it, and
    those no one means: the working folder, home, the root, and what they are in.

    Parameters
    ----------
    source : the model's folder.
    needed_bytes : the expected size of the output.

    Raises
    ------
    InvalidInput
    """
    target = output.expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise InvalidInput(f"the output {output} is a file; give a folder that does not exist yet")
    if source is not None and _holds(target, source.resolve()):
        raise InvalidInput(f"the output {output} is or holds the model itself; give another folder")
    if any(_holds(target, precious) for precious in (Path.cwd(), Path(os.path.expanduser("~")))):
        raise InvalidInput(f"the output {output} is or holds the working or home folder")
    if os.path.ismount(target):
        raise InvalidInput(f"the output {output} is a mount point; give a folder inside it")
    if target.is_dir() and not overwrite:
        raise InvalidInput(f"the output {output} exists; give another, or --overwrite")
    ancestor = next(parent for parent in target.parents if parent.exists())
    try:  # permissions alone do not tell: the file system may be read-only, or refuse root
        with tempfile.TemporaryDirectory(dir=ancestor, prefix=".fbn-prune-"):
            pass
    except OSError as error:
        raise InvalidInput(
            f"the output {output} cannot be made: {ancestor} is not writable ({error.strerror})"
        ) from error
    check_room(output, needed_bytes, "output", left=_left_bytes(target))


def check_room(place: Path, needed_bytes: int, what: str, *, left: int = 0) -> None:
    """Refuse a place on a disk that has not the room, with the `left` bytes that will be freed first.

    Raises
    ------
    InvalidInput
    """
    ancestor = _there(place)
    free = shutil.disk_usage(ancestor).free + left
    if free < needed_bytes:
        raise InvalidInput(
            f"the {what} {place} needs {needed_bytes / 1e9:.1f} GB, "
            f"but {ancestor} has {free / 1e9:.1f} GB free"
        )


def on_one_disk(one: Path, other: Path) -> bool:
    """Whether two places, which need not exist yet, are on one file system."""
    return _there(one).stat().st_dev == _there(other).stat().st_dev


def _there(place: Path) -> Path:
    """The place itself if it exists, or the nearest folder above it that does."""
    target = place.expanduser().resolve()
    return next(folder for folder in (target, *target.parents) if folder.exists())


def _left_bytes(target: Path) -> int:
    """What killed runs have left beside an output and the next one removes; files with a second name stay."""
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
    """A hidden sibling of `output` to write into; it becomes `output` when the block ends well.

    Any exception, KeyboardInterrupt included, removes it and the parent folders made for it, and
    leaves an existing output as it was. An existing output is replaced only at the end.

    Raises
    ------
    FbnPruneError
        If the folder cannot be made or put in place, or `output` came to be in the meantime.
    """
    target = output.expanduser().resolve()
    made = [parent for parent in target.parents if not parent.exists()]
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
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _own(partial: Path) -> int:
    """Make the folder and hold its lock, by which other runs tell it from what a killed run has left."""
    while True:
        partial.mkdir(parents=True)
        try:
            handle = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:  # another run took it for left, before it was locked
            continue
        if try_lock(handle) and partial.exists():
            return handle
        os.close(handle)


def _clear(target: Path, kind: str) -> None:
    """Delete what killed runs have left beside an output: folders that were to become it ("partial"), or that it was
    before ("old", when the new one stands). What a process still holds is its own."""
    beside = f".{glob.escape(target.name)}.*."
    if kind == "old" and any(owned(other) for other in target.parent.glob(f"{beside}partial")):
        return  # that run may be about to put one back
    for leftover in sorted(target.parent.glob(f"{beside}{kind}")):
        if not owned(leftover):
            logger.info("removing %s, left by a run that was killed", leftover)
            shutil.rmtree(leftover, ignore_errors=True)


def _put_in_place(partial: Path, target: Path, overwrite: bool) -> None:
    """Rename; POSIX renames over an empty folder, anything else is moved aside first."""
    if not (target.exists() and any(target.iterdir())):
        partial.rename(target)
        _flush_folder(target.parent)
        return
    if not overwrite:
        raise FbnPruneError(f"the output {target} appeared during the run; it is left as it is")
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
    """Bring all files to the disk, so that a rename that survives a power cut names whole files."""
    for folder, _, files in os.walk(directory):
        for file in files:
            with open(Path(folder, file), "rb") as handle:
                os.fsync(handle.fileno())
        _flush_folder(Path(folder))


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):  # some systems and network folders know no fsync of a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Tell of a full or failing disk in one line."""
    try:
        yield
    except OSError as error:
        raise FbnPruneError(f"cannot write {directory}: {error.strerror or error}") from error
