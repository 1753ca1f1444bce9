"""`fbn-prune work list|clean DIR`: list or remove the stored stages of unfinished runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fbn_prune.cli import console
from fbn_prune.cli.options import Json
from fbn_prune.errors import counted

Folder = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="A work directory, or the folder that contains outputs."),
]

app = typer.Typer(help="List or remove the stored stages of unfinished runs.")


@app.command("list")
def list_runs(folder: Folder = Path("."), *, json: Json = False) -> None:
    """List the unfinished runs in a work directory, or of the outputs in a folder."""
    from fbn_prune import api

    runs = api.unfinished_runs(folder)
    if json:
        rows = [asdict(run) | {"folder": str(run.folder)} for run in runs]
        console.print_json({"runs": rows})
        return
    if not runs:
        console.print_line(f"no unfinished runs in {folder}")
        return
    table = Table(title=f"unfinished runs in {folder}", title_justify="left")
    counts = ("stages", "layers", "matched", "shards")
    for heading in ("folder", "model", "output", *counts, "size", "idle", ""):
        table.add_column(heading)
    for run in runs:
        idle = f"{run.idle_seconds / 3600:.1f} h"
        numbers = map(str, (run.stages, run.layers, run.matched_layers, run.shards))
        cells = (run.model, run.output, *numbers, console.size(run.bytes))
        table.add_row(str(run.folder), *cells, idle, "in use" if run.in_use else "")
    console.print_table(table)


@app.command("clean")
def clean_runs(folder: Folder = Path(".")) -> None:
    """Remove the unfinished runs that no process works on."""
    from fbn_prune import api

    removed, left = api.clean_runs(folder)
    size = console.size(sum(run.bytes for run in removed))
    console.print_line(f"removed {counted(len(removed), 'unfinished run')}, {size}")
    for run in left:
        console.print_line(f"in use, not removed: {run.folder}")
