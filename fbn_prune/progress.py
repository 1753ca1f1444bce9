"""Progress and timing of a run's stages.

Library functions report their stages to a :class:`StageClock` and print nothing; the command line passes the clock a
:class:`Display`. The result of a run reports the clock's seconds as `stages`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

Advance = Callable[[int], None]
"""A function to call with the number of units that were finished since its last call."""


class Display(Protocol):
    """Shows the running stage and notes to the user."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Advance]: ...

    def note(self, line: str) -> None: ...


class SilentDisplay:
    """Shows nothing; the default of the Python API."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        return nullcontext(lambda done: None)

    def note(self, line: str) -> None:
        return None


class StageClock:
    """Shows the stages of a run on a display and measures their wall time.

    Parameters
    ----------
    display
        Default: nothing is shown.

    Attributes
    ----------
    seconds
        Wall seconds by stage name, in the order in which the stages first ran.
    """

    def __init__(self, display: Display | None = None) -> None:
        self.display: Display = display if display is not None else SilentDisplay()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int = 1, unit: str = "steps") -> Iterator[Advance]:
        """Time a stage and show it; yields the function that reports progress.

        Parameters
        ----------
        name
            Name of the stage. The seconds of stages with the same name are added up.
        total
            Number of units in the stage.
        unit
            Name of the unit, in the plural.
        """
        start = time.perf_counter()
        try:
            with self.display.stage(name, total, unit) as advance:
                yield advance
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def note(self, line: str) -> None:
        """Show one line to the user."""
        self.display.note(line)

    def note_time(self, stage: str, what: str, took: float, left: int) -> None:
        """After the first of several like steps, note how long it took and how long the others will.

        Parameters
        ----------
        stage, what
            Names of the stage and of the step.
        took
            Seconds of the step; nothing is noted where it took less than one.
        left
            Number of the other steps.
        """
        if left and took >= 1:
            expected = f"about {left * took:.0f} s for the other {left}"
            self.note(f"{stage}: {what} took {took:.0f} s; {expected}")
