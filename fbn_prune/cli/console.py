"""Print progress and results: bars on a terminal, plain lines elsewhere; results to stdout, all else to stderr."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from rich.console import Console
from rich.measure import Measurement
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
from rich.text import Text

from fbn_prune.cli.streams import Muted, say, write
from fbn_prune.distributed import is_first
from fbn_prune.progress import Advance, Display, SilentDisplay

LINE_SECONDS = 10.0
"""Interval between the lines about a running stage if stderr is not a terminal."""


class TerminalDisplay:
    """Shows a progress bar for each stage, with its rate and remaining time."""

    def __init__(self) -> None:
        self._console = _console(stderr=True)
        self._progress: Progress | None = None

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        outermost = self._progress is None
        if self._progress is None:
            plain = self._console.options.ascii_only
            self._progress = Progress(
                SpinnerColumn("line" if plain else "dots", finished_text="+" if plain else "✓"),
                TextColumn("{task.description:<20}", markup=False),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}", markup=False),
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
        self._console.print(line)


class LineDisplay:
    """Prints a line about a running stage every :data:`LINE_SECONDS`, also during a long step, and one at its end.

    Stages of less than a second print nothing.
    """

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        start = printed = time.perf_counter()
        done = 0
        ended = threading.Event()

        def print_state(now: float) -> None:
            nonlocal printed
            printed = now
            if not done:
                self.note(f"{name}: 0% after {now - start:.0f} s")
                return
            rate = done / (now - start)
            left = (total - done) / rate
            self.note(f"{name}: {done / total:.0%}, {_short(rate)} {unit}/s, {left:.0f} s left")

        def advance(count: int) -> None:
            nonlocal done
            done += count
            now = time.perf_counter()
            if now - printed >= LINE_SECONDS and 0 < done < total:
                print_state(now)

        def print_while_waiting() -> None:
            while not ended.wait(LINE_SECONDS):
                now = time.perf_counter()
                if now - printed >= 2 * LINE_SECONDS:
                    print_state(now)

        threading.Thread(target=print_while_waiting, daemon=True).start()
        try:
            yield advance
        finally:
            ended.set()
        took = time.perf_counter() - start
        if took >= 1:
            self.note(f"{name}: done in {took:.1f} s")

    def note(self, line: str) -> None:
        say(line)


def display() -> Display:
    """Return the display for this process's stderr; ranks above 0 show nothing."""
    if not is_first():
        return SilentDisplay()
    return TerminalDisplay() if sys.stderr.isatty() else LineDisplay()


def print_json(value: dict[str, Any]) -> None:
    """Print a JSON object on stdout; what its encoding lacks is written as JSON's own escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    write(text + "\n")


def print_table(table: Table) -> None:
    """Print a table on stdout, 120 columns wide if it is not a terminal.

    Where the terminal is too narrow for the numbers, each row is printed as a list of its values.
    """
    # Capturing writes nothing to the stream, but even that fails on a full device.
    muted = cast(TextIO, Muted(sys.stdout))
    console = _console(width=None if sys.stdout.isatty() else 120, file=muted)
    for column in table.columns:
        if column.justify == "left":
            column.overflow = "fold"
    with console.capture() as captured:
        if _fits(table, console):
            console.print(table)
        else:
            console.print(table.title or "")
            for line in _as_list(table):
                console.print(line)
    write(captured.get())


def print_line(line: str) -> None:
    """Print a line on stdout."""
    write(line + "\n")


def _console(*, stderr: bool = False, width: int | None = None, **more: Any) -> Console:
    """Return a console that prints text as it is: a name such as `exp [final]` is no markup, `:cat:` no emoji."""
    plain: Any = {"markup": False, "emoji": False, "highlight": False}
    return Console(stderr=stderr, width=width, **plain, **more)


def _fits(table: Table, console: Console) -> bool:
    """Whether all numbers can be printed whole; other columns may be folded, down to a few characters."""
    needed = 1
    for column in table.columns:
        cells = [column.header, *column.cells]
        widths = [Measurement.get(console, console.options, cell).minimum for cell in cells]
        number = column.justify == "right"
        needed += 3 + (max(widths) if number else min(max(widths), _NARROWEST))
    return needed <= console.width


_NARROWEST = 8
"""Width to which a column of words may be folded."""


def _as_list(table: Table) -> Iterator[str]:
    """Yield the rows of a table as lines `heading: value`, below the first cell."""
    columns = [[_plain(column.header), *map(_plain, column.cells)] for column in table.columns]
    for first, *others in list(zip(*columns, strict=True))[1:]:
        yield first
        for (heading, *_), value in zip(columns[1:], others, strict=True):
            if value:
                yield f"  {heading}: {value}" if heading else f"  {value}"


def _plain(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


def size(count: float) -> str:
    """Return a number of bytes with its unit, such as 7.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def vocabulary(figures: dict[str, Any]) -> str:
    """Return one line on what a trimmed vocabulary does to held-out text."""
    share, growth = figures["identical_documents"], figures["growth"]
    if share is None:
        return "no text was held out to measure the vocabulary on"
    others = "" if growth is None else f"; the others grow by {growth:.1%} in tokens"
    return f"same pieces in {share:.2%} of {figures['held_out_documents']:,} held-out documents{others}"


def _short(rate: float) -> str:
    for unit in ("", "k", "M", "G"):
        if rate < 1000:
            return f"{rate:.3g}{unit}"
        rate /= 1000
    return f"{rate:.3g}T"
