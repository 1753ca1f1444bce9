"""Write to stdout and stderr so that no reader, terminal or disk can make a run fail.

A reader that has gone (`| head`, a closed terminal) is not an error: the rest is written to nowhere.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from fbn_prune.errors import FbnPruneError

_GONE = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ENXIO, errno.ECONNRESET)
"""Errors of a stream that nobody reads: a closed pipe, a closed descriptor, a terminal that was hung up."""


class CannotPrint(FbnPruneError):
    """A result cannot be printed, for example because the disk of a redirected stdout is full."""


class Outlet:
    """A text stream that drops what is written after its reader has gone.

    Parameters
    ----------
    stream
        The stream to write to.
    patient
        Also drop what cannot be written for other reasons.
    """

    def __init__(self, stream: TextIO, *, patient: bool) -> None:
        self._stream, self._patient = stream, patient

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Python writes what a stream still holds when it ends, and would fail then.
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
                self._stream.flush()
            if error.errno not in _GONE and not self._patient:
                raise


class Muted:
    """Looks like a text stream to whoever asks for its encoding and terminal, and drops all that is written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return None


def open_streams() -> None:
    """Make stdout and stderr usable whatever this process was started with.

    Closed descriptors are opened on the null device, because the next file to be opened would get their numbers.
    Characters that a stream cannot encode are written as escapes.
    """
    for number in (0, 1, 2):
        if not _is_open(number):
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        # A stream that was closed from the start is None.
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, cast(TextIO, Outlet(stream, patient=name == "stderr")))


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def write(text: str) -> None:
    """Write text to stdout at once.

    Raises
    ------
    CannotPrint
        The text cannot be written although somebody may read it.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise CannotPrint(f"cannot print the result: {error.strerror or error}") from error


def say(line: str) -> None:
    """Write a line to stderr at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@contextmanager
def finished(output: object) -> Iterator[None]:
    """Mark the end of a command, when its output is written: what fails now is reported but does not undo the work.

    Parameters
    ----------
    output
        What was written, as the messages name it.
    """
    try:
        yield
    except CannotPrint as error:
        say(f"warning: {error}; {output} is complete")
    except BaseException as error:
        error.written = str(output)  # type: ignore[attr-defined]
        raise
