"""`fbn-prune convert`: write a checkpoint in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fbn_prune.cli import console
from fbn_prune.cli.options import Json

Model = Annotated[str, typer.Option("--model", help="Checkpoint folder or Hub id, pruned or not.")]
Output = Annotated[Path, typer.Option("--output", help="File to write, such as model.gguf.")]
Format = Annotated[str, typer.Option("--to", help="Format to write.")]
Matrices = Annotated[
    Literal["auto", "f32", "f16", "bf16"],
    typer.Option("--gguf-type", help="Type of the matrices; auto keeps the checkpoint's type."),
]
Verify = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        help="Compare greedy tokens and log-probabilities of the file in llama.cpp with those of transformers. "
        "Default: where xllamacpp is installed.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]


def command(
    model: Model,
    output: Output,
    to: Format = "gguf",
    gguf_type: Matrices = "auto",
    *,
    verify: Verify = None,
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint in another format: GGUF for llama.cpp."""
    from fbn_prune import api

    display = console.display()
    written = api.convert(
        model,
        output,
        to=to,
        dtype=gguf_type,
        verify=verify,
        overwrite=overwrite,
        display=display,
    )
    for line in written["notes"]:
        display.note(f"note: {line}")
    if json:
        console.print_json(written)
    else:
        size = console.size(written["bytes"])
        console.print_line(f"{output}: {size}, architecture {written['architecture']}")
