"""Print perplexity and time against the number of calibration tokens, on a text that is the same for all.

    python eval/quality/tokens_curve.py --model MODEL --calibrate a.txt --evaluate b.txt --sparsity 0.5 \
        --tokens 8192 --tokens 16384 --tokens 32768 --output curve.json

Every row is one run of `fbn-prune` with its settings otherwise as they are. The evaluation text must be none of the
calibration text. A table in `--output` goes on where it was interrupted.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import protocol
import torch
import typer
from rich.console import Console
from rich.table import Table

from fbn_prune import prune_checkpoint
from fbn_prune.data.calibration import Batch, TokenBlocks
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.perplexity import perplexity
from fbn_prune.recipe import Recipe


def held_out(checkpoint: Checkpoint, files: list[Path], context: int, blocks: int) -> list[Batch]:
    """Return the first blocks of each evaluation text in batches."""
    tokenizer = checkpoint.load_tokenizer()
    found = [b for file in files for b in protocol.first_blocks(file, tokenizer, context, blocks)]
    return TokenBlocks(tuple(found), context, tuple(map(str, files))).batches(protocol.BATCH_TOKENS)


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint folder or GGUF file.")],
    calibrate: Annotated[list[str], typer.Option(help="Calibration text; repeat for several.")],
    evaluate: protocol.Evaluate,
    tokens: Annotated[list[int], typer.Option(help="Calibration tokens; repeat.")],
    sparsity: Annotated[float, typer.Option(help="Share of the neurons to remove.")] = 0.5,
    context: protocol.Context = 512,
    evaluation_blocks: protocol.EvaluationBlocks = 40,
    setting: Annotated[list[str], typer.Option(help="KEY=VALUE of the recipe; repeat.")] = [],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="Type that the model computes in.")] = "float32",
    output: protocol.Output = None,
) -> None:
    about: dict[str, Any] = {"model": model.name, "sparsity": sparsity, "context": context}
    about |= {"dtype": dtype, "settings": setting, "evaluation_blocks": evaluation_blocks}
    about |= {"calibrate": [Path(one).name for one in calibrate]}
    about |= {"evaluate": [one.name for one in evaluate]}
    facts = protocol.table_to_go_on(output, about)
    dense = Checkpoint.open(model)
    batches = held_out(dense, evaluate, context, evaluation_blocks)

    def measured(checkpoint: Checkpoint) -> float:
        return perplexity(
            ModelAdapter(checkpoint.load_model("cpu", getattr(torch, dtype))), batches
        )

    if "dense" not in facts:
        facts["dense"] = measured(dense)
    chosen = dict(one.split("=", 1) for one in setting)
    for count in tokens:
        if str(count) in facts["rows"]:
            continue
        with tempfile.TemporaryDirectory() as place:
            recipe = Recipe(
                model=str(model), calibration=calibrate, tokens=count, context=context, dtype=dtype,
                sparsity=sparsity, output=Path(place) / "out", **chosen,
            )  # fmt: skip
            result = prune_checkpoint(recipe=recipe)
            facts["rows"][str(count)] = {
                "perplexity": measured(Checkpoint.open(Path(place) / "out")),
                "tokens": result.calibration_tokens,
                "seconds": round(sum(result.stages.values()), 1),
                "forward_seconds": round(result.forward_seconds, 1),
            }
        protocol.save_json(output, facts)
    table = Table("tokens", "perplexity", "excess", "seconds", title=f"dense {facts['dense']:.2f}")
    for row in facts["rows"].values():
        over = row["perplexity"] - facts["dense"]
        table.add_row(
            f"{row['tokens']:,}", f"{row['perplexity']:.2f}", f"{over:.2f}", f"{row['seconds']:.0f}"
        )
    Console().print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
