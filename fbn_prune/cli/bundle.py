"""`fbn-prune bundle`: put one whole model and the neuron sets of several tasks into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from fbn_prune.cli import console
from fbn_prune.cli.options import Json
from fbn_prune.cli.streams import finished

Tasks = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME=PATH...",
        help="A task's name and its source: a pruned checkpoint, its kept_neurons.safetensors, or "
        "networks.safetensors:2,5,21 for the members of networks. List the most used tasks first.",
    ),
]
Model = Annotated[
    str, typer.Option("--model", help="The whole model: folder, Hub id or `builtin`.")
]
Output = Annotated[Path, typer.Option("--output", help="Folder to write.")]
RefitFlag = Annotated[
    Literal["full", "low-rank", "none"],
    typer.Option(
        "--refit",
        help="How much of a task's refitted output weights to keep: all, a low-rank correction, or none.",
    ),
]
Rank = Annotated[int, typer.Option("--refit-rank", min=1, help="Rank of a low-rank correction.")]
Link = Annotated[
    bool, typer.Option("--link", help="Record where the model is instead of copying it.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")]


def command(
    tasks: Tasks,
    model: Model,
    output: Output,
    refit: RefitFlag = "full",
    refit_rank: Rank = 16,
    *,
    link: Link = False,
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Put a whole model and the neurons of several tasks into one folder; `fbn_prune.serving.load` serves them."""
    from fbn_prune import api

    written = api.write_bundle(
        model,
        tasks,
        output,
        refit=refit,
        refit_rank=refit_rank,
        link=link,
        overwrite=overwrite,
        display=console.display(),
    )
    with finished(output):
        if json:
            console.print_json(written)
        else:
            _show(output, written)


def _show(output: Path, written: dict[str, Any]) -> None:
    whole = written["base"] or "copied"
    table = Table(
        title=f"{output}: whole model {console.size(written['base_bytes'])} ({whole})",
        title_justify="left",
    )
    for heading in ("task", "neurons kept", "set", "own weights"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for name, facts in written["tasks"].items():
        table.add_row(
            name,
            f"{facts['neurons_kept']:,} of {facts['neurons_total']:,}",
            console.size(facts["set_bytes"]),
            console.size(facts["correction_bytes"]),
        )
    console.print_table(table)
