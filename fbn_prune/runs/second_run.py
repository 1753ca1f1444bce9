"""One output, one run: a run locks its output, and another one with the same output is refused before its work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fbn_prune.distributed import is_first
from fbn_prune.errors import InvalidInput
from fbn_prune.runs.unfinished import unfinished_runs
from fbn_prune.store import LOCK, default_place, locked, owned

_OTHER_RUN = "another run is writing the output {}; wait until it ends, or give another --output"


@contextmanager
def output_locked(output: Path) -> Iterator[None]:
    """Lock an output in its default work directory, whatever work directory the run has, so that other runs see it.

    Raises
    ------
    InvalidInput
        If another process holds the lock.
    FbnPruneError
        If the lock cannot be made beside the output.
    """
    place = default_place(output)
    made = [parent for parent in place.parents if not parent.exists()]
    try:
        with locked(place, LOCK, _OTHER_RUN.format(output)):
            try:
                yield
            finally:
                with suppress(OSError):
                    (place / LOCK).unlink()
    finally:
        for folder in (place, *made):
            with suppress(OSError):
                folder.rmdir()


def refuse_second_run(output: Path, work_dir: Path | None = None) -> None:
    """Refuse an output that another process is working on, because only one of the two could be put in place.

    Parameters
    ----------
    work_dir
        A work directory to search besides the output's default one, where a run with another leaves its lock.

    Raises
    ------
    InvalidInput
        There is such a process; it is named.
    """
    if not is_first():  # other processes of a job see the run of the first
        return
    target = str(output.expanduser().resolve())
    default = default_place(output)
    used = [default] if owned(default / LOCK) else []
    for place in {default, default if work_dir is None else work_dir.expanduser()}:
        if place.is_dir():
            runs = unfinished_runs(place)
            used += [run.folder for run in runs if run.in_use and run.output == target]
    for folder in used:
        other = _OTHER_RUN.format(output)
        raise InvalidInput(f"{folder} is in use by process {_process(folder)}: {other}")


def _process(folder: Path) -> str:
    with suppress(OSError):
        return (folder / LOCK).read_text(encoding="ascii", errors="replace").strip()
    return "unknown"
