"""Progress and results on the terminal: a bar where there is one, plain lines where there is none.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fbn_prune.distributed import is_first
from fbn_prune.progress import Advance, Display, SilentDisplay

LINE_SECONDS = 10.0
"""Without a terminal, a running stage says how far it is this often."""


class TerminalDisplay:
    """A rich progress bar for each stage, with rate and remaining time."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        outermost = self._progress is None
        if self._progress is None:
            self._progress = Progress(
                SpinnerColumn(finished_text="✓"),
                TextColumn("{task.description:<20}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._progress.start()
        progress, start, done = self._progress, time.perf_counter(), 0
        task = progress.add_task(name, total=total, rate="")

        def advance(count: int) -> None:
            nonlocal done
            done += count
            rate = done / max(time.perf_counter() - start, 1e-9)
            progress.update(task, advance=count, rate=f"{_short(rate)} {unit}/s")

        try:
            yield advance
            progress.update(task, completed=total)
        finally:
            if outermost:
                progress.stop()
                self._progress = None

    def note(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)


class LineDisplay:
    """A line when a stage has taken over a second, when it goes on, when it ends, and when nothing was heard of it
    for long: a step of a large model can take minutes."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        start = spoken = time.perf_counter()
        done = 0
        ended = threading.Event()

        def speak(now: float) -> None:
            nonlocal spoken
            spoken = now
            if not done:
                self.note(f"{name}: 0%, at work for {now - start:.0f} s")
                return
            rate = done / (now - start)
            left = (total - done) / rate
            self.note(f"{name}: {done / total:.0%}, {_short(rate)} {unit}/s, {left:.0f} s left")

        def advance(count: int) -> None:
            nonlocal done
            done += count
            now = time.perf_counter()
            if now - spoken >= LINE_SECONDS and 0 < done < total:
                speak(now)

        def reassure() -> None:
            while not ended.wait(LINE_SECONDS):
                now = time.perf_counter()
                if now - spoken >= 2 * LINE_SECONDS:
                    speak(now)

        threading.Thread(target=reassure, daemon=True).start()
        try:
            yield advance
        finally:
            ended.set()
        took = time.perf_counter() - start
        if took >= 1:
            self.note(f"{name}: done in {took:.1f} s")

    def note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def display() -> Display:
    """What suits this process's stderr; of several processes on one job only the first speaks."""
    if not is_first():
        return SilentDisplay()
    return TerminalDisplay() if sys.stderr.isatty() else LineDisplay()


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(table: Table) -> None:
    """A table on stdout, as wide as it needs where stdout is no terminal."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)


def print_line(line: str) -> None:
    """A plain line on stdout."""
    print(line)


def size(count: float) -> str:
    """Bytes with a unit: 7.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _short(rate: float) -> str:
    for unit in ("", "k", "M", "G"):
        if rate < 1000:
            return f"{rate:.3g}{unit}"
        rate /= 1000
    return f"{rate:.3g}T"
