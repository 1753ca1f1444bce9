"""`fbn-prune dequantize`: a quantised checkpoint as a plain one, which can be pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fbn_prune.cli import console
from fbn_prune.cli.options import Json

Model = Annotated[str, typer.Option("--model", help="Quantized checkpoint folder or hub id.")]
Output = Annotated[Path, typer.Option("--output", help="Folder to write.")]
Dtype = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option(
        "--dtype",
        help="Type of all weights. Default: the config's for those that were quantized, the others as they are.",
    ),
]
ShardSize = Annotated[
    str, typer.Option("--max-shard-size", help="Largest weights file, as 5GB or 500MB.")
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
    """Write a plain checkpoint of a quantized one: fp8, compressed-tensors or bitsandbytes."""
    from fbn_prune.export.dequantized import write_dequantized
    from fbn_prune.export.directory import atomic_directory, check_output
    from fbn_prune.model.quantized import PLAIN_DTYPES, open_quantized
    from fbn_prune.progress import StageClock
    from fbn_prune.recipe import parse_size

    shard_bytes = parse_size(max_shard_size, "max_shard_size")
    source = open_quantized(model, None if dtype is None else PLAIN_DTYPES[dtype])
    check_output(output, overwrite, source.path, needed_bytes=source.total_bytes)
    clock = StageClock(console.display())
    with (
        clock.stage("dequantize", source.total_bytes, "bytes") as advance,
        atomic_directory(output, overwrite) as folder,
    ):
        write_dequantized(source, folder, max_shard_size=shard_bytes, progress=advance)
    written = str(source.storage_dtype).removeprefix("torch.")
    if json:
        console.print_json(
            {
                "output": str(output),
                "method": source.method,
                "dequantized": len(source.stored),
                "dtype": written,
                "parameters": source.total_parameters,
                "bytes": source.total_bytes,
            }
        )
    else:
        console.print_line(
            f"{output}: {console.size(source.total_bytes)}, "
            f"{len(source.stored)} weights from {source.method} to {written}"
        )
