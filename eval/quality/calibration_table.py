"""Print the perplexity on several texts of a model that was pruned on each of several texts, its own among them.

    python eval/quality/calibration_table.py --model MODEL --calibrate wiki=a.txt --calibrate own=generated \
        --calibrate both=a.txt,generated --evaluate wiki=b.txt --evaluate own=generated --tokens 16384

Every row is one run of `fbn-prune`. `generated` is text that the dense model writes; what it is measured on has another
seed. A table in `--output` goes on where it was interrupted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import protocol
import torch
import typer
from rich.console import Console
from rich.table import Table

from fbn_prune import prune_checkpoint
from fbn_prune.data.calibration import Batch, TokenBlocks
from fbn_prune.data.text_files import GENERATED
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.perplexity import perplexity
from fbn_prune.model.writing import write_text
from fbn_prune.recipe import Recipe


def named(pairs: Sequence[str]) -> dict[str, list[str]]:
    """Return the sources of each NAME=SOURCE,SOURCE."""
    found = {}
    for pair in pairs:
        name, equals, sources = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"{pair}: write NAME=SOURCE,SOURCE")
        found[name] = sources.split(",")
    return found


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint folder or GGUF file.")],
    calibrate: Annotated[list[str], typer.Option(help="NAME=SOURCE,SOURCE; repeat.")],
    evaluate: Annotated[list[str], typer.Option(help="NAME=SOURCE; repeat.")],
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16384,
    sparsity: Annotated[list[float], typer.Option(help="Share to remove; repeat.")] = [0.5],  # noqa: B006
    context: protocol.Context = 512,
    evaluation_tokens: Annotated[int, typer.Option(help="Of each text.")] = 16384,
    dtype: Annotated[str, typer.Option(help="Type that the models compute in.")] = "float32",
    output: protocol.Output = None,
) -> None:
    about: dict[str, Any] = {"model": model.name, "tokens": tokens, "context": context}
    about |= {"dtype": dtype, "evaluation_tokens": evaluation_tokens}
    facts = protocol.table_to_go_on(output, about)
    checkpoint = Checkpoint.open(model)
    tokenizer = checkpoint.load_tokenizer()
    dense = ModelAdapter(checkpoint.load_model("cpu", getattr(torch, dtype)))

    def batches(source: str) -> list[Batch]:
        if source == GENERATED:
            rows = write_text(
                dense.model,
                tokenizer,
                tokens=evaluation_tokens,
                context=context,
                cached=2 * protocol.BATCH_TOKENS,
                seed="measured",
            )
        else:
            count = evaluation_tokens // context
            rows = protocol.first_blocks(Path(source), tokenizer, context, count)
        return TokenBlocks(tuple(rows), context, (source,)).batches(protocol.BATCH_TOKENS)

    measured = {name: batches(sources[0]) for name, sources in named(evaluate).items()}

    def losses(adapter: ModelAdapter) -> dict[str, float]:
        return {name: perplexity(adapter, text) for name, text in measured.items()}

    facts["dense"] = losses(dense)
    for share in sparsity:
        for name, sources in named(calibrate).items():
            key = f"{share:g} / {name}"
            if key in facts["rows"]:
                continue
            with tempfile.TemporaryDirectory() as place:
                recipe = Recipe(
                    model=str(model), calibration=sources, tokens=tokens, context=context,
                    dtype=dtype, sparsity=share, output=Path(place) / "out",
                )  # fmt: skip
                result = prune_checkpoint(recipe=recipe)
                pruned = Checkpoint.open(Path(place) / "out")
                found = losses(ModelAdapter(pruned.load_model("cpu", getattr(torch, dtype))))
            facts["rows"][key] = {**found, "stages": result.stages}
            protocol.save_json(output, facts)
    table = Table("removed / calibrated on", *measured)
    table.add_row("dense", *[f"{value:.2f}" for value in facts["dense"].values()])
    for key, row in facts["rows"].items():
        table.add_row(key, *[f"{row[name]:.2f}" for name in measured])
    Console().print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
