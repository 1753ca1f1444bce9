"""What the libraries below say of themselves is kept from the command line; our own warnings are one line each.

Nothing is changed by an import, and what is changed for a command is as it was after it.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from fbn_prune.distributed import is_first

VERBOSITY = "TRANSFORMERS_VERBOSITY"
"""Who sets this variable wants to hear transformers, and does."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """For the time of a command: transformers logs nothing, and of Python's warnings only ours are shown, each once.

    Warnings that were asked for (`python -W`, PYTHONWARNINGS) are shown as Python shows them.
    """
    with _quiet_transformers(), warnings.catch_warnings():
        shown: set[str] = set()
        native = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if category.__module__.partition(".")[0] != __package__.partition(".")[0]:
                if sys.warnoptions:
                    native(message, category, filename, lineno, file, line)
                return
            text = " ".join(str(message).split())
            if text not in shown and is_first():
                print(f"warning: {text}", file=sys.stderr, flush=True)
            shown.add(text)

        if not sys.warnoptions:
            warnings.simplefilter("always")
        warnings.showwarning = show
        yield


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    if VERBOSITY in os.environ:
        yield
        return
    # The variable is for an import that is still to come, the level for one that has been.
    logger = logging.getLogger("transformers")
    level = logger.level
    os.environ[VERBOSITY] = "critical"
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        os.environ.pop(VERBOSITY, None)
        logger.setLevel(level)
