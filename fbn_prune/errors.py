"""The two exceptions of the package. The command line prints their message as one line and returns their exit code."""

from __future__ import annotations


class FbnPruneError(Exception):
    """The work failed; the message is one line that says what went wrong, where, and what to do. Exit code 1."""

    exit_code = 1


class InvalidInput(FbnPruneError):
    """An input cannot be used; raised before anything is written. Exit code 2."""

    exit_code = 2
