"""`fbn-prune report`: write the HTML page of an output folder, with the results of other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fbn_prune.cli import console
from fbn_prune.cli.streams import finished

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Output of the main job, or of `discover`.")
]
Compare = Annotated[Path | None, typer.Option("--compare", help="JSON results of `compare`.")]
Ablate = Annotated[Path | None, typer.Option("--ablate", help="JSON results of `ablate`.")]
Evaluate = Annotated[Path | None, typer.Option("--evaluate", help="JSON results of `evaluate`.")]
Output = Annotated[Path, typer.Option("--output", help="File to write; it must not exist.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]


def command(
    folder: Folder,
    *,
    output: Output = Path("report.html"),
    compare: Compare = None,
    ablate: Ablate = None,
    evaluate: Evaluate = None,
    overwrite: Overwrite = False,
) -> None:
    """Write one self-contained HTML page about a run: its networks, its cuts and its results."""
    from fbn_prune import api

    api.write_report(
        folder, output, compare=compare, ablate=ablate, evaluate=evaluate, overwrite=overwrite
    )
    with finished(output):
        console.print_line(str(output))
