"""`fbn-prune bundle`: one whole model and several tasks' sets of neurons, to be served together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from fbn_prune.cli import console
from fbn_prune.cli.options import Json

Tasks = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME=PATH...",
        help="A task and where it comes from: a pruned checkpoint, its kept_neurons.safetensors, or "
        "networks.safetensors:2,5,21 for the members of networks. The tasks most used first.",
    ),
]
Model = Annotated[
    str, typer.Option("--model", help="The whole model: folder, hub id or `builtin`.")
]
Output = Annotated[Path, typer.Option("--output", help="Folder to write.")]
RefitFlag = Annotated[
    Literal["full", "low-rank", "none"],
    typer.Option(
        "--refit",
        help="What a task keeps of its refitted output weights: all, a correction of low rank, or "
        "nothing but its set.",
    ),
]
Rank = Annotated[int, typer.Option("--refit-rank", min=1, help="Rank of a low-rank correction.")]
Link = Annotated[bool, typer.Option("--link", help="Name the model's place instead of copying it.")]
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
    """Put a whole model and several tasks' neurons into one folder; `fbn_prune.serving.load` serves them."""
    from fbn_prune.data import builtin
    from fbn_prune.export.directory import check_output
    from fbn_prune.model.checkpoint import Checkpoint
    from fbn_prune.progress import StageClock
    from fbn_prune.serving.bundle import TaskSource, write_bundle

    sources = [TaskSource.parse(task) for task in tasks]
    base = Checkpoint.open(str(builtin.model_path()) if model == "builtin" else model, ragged=True)
    needed = 0 if link else base.total_bytes
    check_output(output, overwrite, base.path, needed_bytes=needed)
    total = base.total_bytes * len(sources)
    with StageClock(console.display()).stage("bundle", total, "bytes") as advance:
        written = write_bundle(
            base,
            sources,
            output,
            refit=refit,
            rank=refit_rank,
            link=link,
            overwrite=overwrite,
            progress=advance,
        )
    if json:
        console.print_json(written)
        return
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
