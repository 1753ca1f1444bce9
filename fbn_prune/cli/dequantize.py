"""`fbn-prune dequantize`: write a quantized checkpoint as a plain one, which can be pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fbn_prune.cli import console
from fbn_prune.cli.options import Json
from fbn_prune.cli.streams import finished
from fbn_prune.errors import counted

Model = Annotated[
    str, typer.Option("--model", help="Folder or Hub id of a quantized checkpoint, or a GGUF file.")
]
Output = Annotated[Path, typer.Option("--output", help="Folder to write.")]
Dtype = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option(
        "--dtype",
        help="Type of all weights. Default: the config's type for quantized weights; the others keep theirs.",
    ),
]
ShardSize = Annotated[
    str, typer.Option("--max-shard-size", help="Size of the largest weights file, as 5GB or 500MB.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")]


def command(
    model: Model,
    output: Output,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    *,
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a quantized checkpoint (fp8, compressed-tensors, bitsandbytes or GGUF) as a plain one."""
    from fbn_prune import api

    written = api.dequantize(
        model,
        output,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        display=console.display(),
    )
    with finished(output):
        if json:
            console.print_json(written)
        else:
            console.print_line(
                f"{output}: {console.size(written['bytes'])}, "
                f"{counted(written['dequantized'], 'weight')} from {written['method']} to {written['dtype']}"
            )
