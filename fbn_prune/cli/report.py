"""`fbn-prune report`: the page of an output folder, with the results of other commands added."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fbn_prune.cli import console
from fbn_prune.errors import InvalidInput

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Output of the main job, or of `discover`.")
]
Compare = Annotated[
    Path | None, typer.Option("--compare", help="What `compare` wrote or printed as JSON.")
]
Ablate = Annotated[Path | None, typer.Option("--ablate", help="What `ablate --json` printed.")]
Evaluate = Annotated[
    Path | None, typer.Option("--evaluate", help="What `evaluate --json` printed.")
]
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
    """Draw what a run found and did as one HTML file that needs nothing beside it."""
    if output.exists() and not overwrite:
        raise InvalidInput(f"the output {output} exists; give another, or --overwrite")
    if not output.resolve().parent.is_dir():
        raise InvalidInput(f"{output}: there is no folder {output.resolve().parent}")
    from fbn_prune.export.report.facts import read_facts
    from fbn_prune.export.report.page import write_report

    facts = read_facts(folder, compare=compare, ablate=ablate, evaluate=evaluate)
    write_report(facts, output)
    console.print_line(str(output))
