"""Silence the log messages and warnings of other libraries during a command; print our own warnings as one line.

All settings are restored after the command.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from fbn_prune.cli.streams import say
from fbn_prune.distributed import is_first

VERBOSITY = "TRANSFORMERS_VERBOSITY"
"""If the user sets this variable, the messages of transformers are shown."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence transformers, and show only the warnings of this package, each once.

    Warnings that the user enables (`python -W`, PYTHONWARNINGS) are shown as usual.
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
                say(f"warning: {text}")
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
    # transformers reads the variable when it is imported; afterwards only the level has an effect.
    logger = logging.getLogger("transformers")
    level = logger.level
    os.environ[VERBOSITY] = "critical"
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        os.environ.pop(VERBOSITY, None)
        logger.setLevel(level)
