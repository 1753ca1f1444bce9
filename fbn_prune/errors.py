"""The two exceptions of the package, and how their messages count.

The command line prints a message as one line and returns the exit code.
"""

from __future__ import annotations


class FbnPruneError(Exception):
    """The work failed; the message is one line that says what went wrong, where, and what to do. Exit code 1."""

    exit_code = 1


class InvalidInput(FbnPruneError):
    """An input cannot be used; raised before anything is written. Exit code 2."""

    exit_code = 2


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, such as "1 tensor" or "2,000 tensors"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
