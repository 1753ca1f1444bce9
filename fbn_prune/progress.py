"""Progress and timing of a run's stages, without printing: the command line supplies the display.

Library functions take a :class:`Progress` and say what they do; :class:`StageClock` keeps the seconds of each stage,
which the result reports as `stages`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

Advance = Callable[[int], None]
"""Called with the number of units done since the last call."""


class Display(Protocol):
    """What shows a stage while it runs."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Advance]: ...

    def note(self, line: str) -> None: ...


class SilentDisplay:
    """Shows nothing: the default of the Python API."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        return nullcontext(lambda done: None)

    def note(self, line: str) -> None:
        return None


class StageClock:
    """Names the stages of a run, shows them on a display and keeps their wall time.

    Attributes
    ----------
    seconds
        Stage name -> wall seconds, in the order in which the stages first ran.
    """

    def __init__(self, display: Display | None = None) -> None:
        self.display: Display = display if display is not None else SilentDisplay()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int = 1, unit: str = "steps") -> Iterator[Advance]:
        start = time.perf_counter()
        try:
            with self.display.stage(name, total, unit) as advance:
                yield advance
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def note(self, line: str) -> None:
        """Say something the user should know, once, on the log stream."""
        self.display.note(line)
