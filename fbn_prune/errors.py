"""The two ways in which a run ends early; the command line turns them into one line and an exit code."""

from __future__ import annotations


class FbnPruneError(Exception):
    """The work failed. The message is one line: what went wrong, where, and what to do. Exit code 1."""

    exit_code = 1


class InvalidInput(FbnPruneError):
    """The input cannot be used as given. Raised before anything is written. Exit code 2."""

    exit_code = 2
