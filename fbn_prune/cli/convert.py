"""`fbn-prune convert`: a checkpoint in another loader's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fbn_prune.cli import console
from fbn_prune.cli.options import Json
from fbn_prune.errors import InvalidInput

Model = Annotated[str, typer.Option("--model", help="Checkpoint folder or hub id, pruned or not.")]
Output = Annotated[Path, typer.Option("--output", help="File to write, as model.gguf.")]
Format = Annotated[Literal["gguf"], typer.Option("--to", help="Format to write.")]
Matrices = Annotated[
    Literal["auto", "f32", "f16", "bf16"],
    typer.Option("--gguf-type", help="Type of the matrices; auto keeps the checkpoint's."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]


def command(
    model: Model,
    output: Output,
    to: Format = "gguf",
    gguf_type: Matrices = "auto",
    *,
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint in another format: GGUF, which llama.cpp and what is built on it load."""
    if output.exists() and not (overwrite and output.is_file()):
        raise InvalidInput(f"the output {output} exists; give another, or --overwrite")
    from fbn_prune.export.gguf import write_gguf
    from fbn_prune.model.checkpoint import Checkpoint
    from fbn_prune.progress import StageClock

    source = Checkpoint.open(model, ragged=True)
    display, notes = console.display(), list[str]()
    with StageClock(display).stage("convert", source.total_bytes, "bytes") as advance:
        arch = write_gguf(source, output, matrices=gguf_type, progress=advance, note=notes.append)
    for line in notes:
        display.note(f"note: {line}")
    size = output.stat().st_size
    if json:
        console.print_json(
            {
                "output": str(output),
                "format": to,
                "architecture": arch,
                "bytes": size,
                "notes": notes,
            }
        )
    else:
        console.print_line(f"{output}: {console.size(size)}, architecture {arch}")
