"""`fbn-prune trim-vocabulary`: write a checkpoint that keeps only the tokens that given texts use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fbn_prune.cli import console
from fbn_prune.cli.options import Json
from fbn_prune.errors import InvalidInput

Model = Annotated[
    str, typer.Option("--model", help="Checkpoint folder, pruned or not, Hub id, or `builtin`.")
]
Output = Annotated[Path | None, typer.Option("--output", help="Folder to write.")]
Texts = Annotated[
    list[str],
    typer.Option(
        "--texts", help="Text whose tokens stay, in the forms of --calibration. Repeat for several."
    ),
]
MinCount = Annotated[
    int, typer.Option("--min-count", min=1, help="How often the texts must use a token.")
]
Characters = Annotated[
    str, typer.Option("--characters", help="Characters whose tokens stay in any case, as äöü.")
]
Ascii = Annotated[
    bool,
    typer.Option("--ascii", help="Keep all tokens of ASCII characters: for English and code."),
]
HeldOut = Annotated[
    list[str] | None,
    typer.Option(
        "--held-out-texts",
        help="Text to measure the vocabulary on. Default: a tenth of --texts, whose tokens stay all the same.",
    ),
]
ShardSize = Annotated[
    str, typer.Option("--max-shard-size", help="Size of the largest weights file, as 5GB or 500MB.")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Allow the tokenizer to run code from the checkpoint."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Choose the tokens and measure the choice; write nothing.")
]


def command(
    model: Model,
    texts: Texts,
    output: Output = None,
    min_count: MinCount = 1,
    characters: Characters = "",
    held_out_texts: HeldOut = None,
    max_shard_size: ShardSize = "5GB",
    *,
    ascii: Ascii = False,
    trust_remote_code: Trust = False,
    dry_run: DryRun = False,
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Keep only the tokens that given texts use: a smaller embedding and head, and the same layers."""
    if output is None and not dry_run:
        raise InvalidInput("--output is missing: name the folder to write, or add --dry-run")
    from fbn_prune import api

    api.check_models([model], [*texts, *(held_out_texts or ())])
    result = api.trim_vocabulary(
        model,
        None if dry_run else output,
        texts,
        min_count=min_count,
        characters=characters,
        ascii=ascii,
        held_out=held_out_texts or (),
        max_shard_size=max_shard_size,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        display=console.display(),
    )
    figures = result.to_json()
    if json:
        console.print_json(figures)
        return
    place = "dry run" if result.output is None else f"{model} -> {output}"
    table = Table(title=place, title_justify="left")
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    tokens = figures["vocabulary"]
    for name, before, after, style in (
        ("tokens", tokens["tokens_before"], tokens["tokens_after"], "{:,}".format),
        ("parameters", result.parameters_before, result.parameters_after, "{:,}".format),
        ("weights", result.bytes_before, result.bytes_after, console.size),
    ):
        table.add_row(name, style(before), style(after), f"{after / before - 1:+.1%}")
    console.print_table(table)
    console.print_line(console.vocabulary(tokens))
