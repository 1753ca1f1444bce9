"""Held-out perplexity of a mixture of experts cut to 75 and 50 % of its expert parameters, by each way.

    cd eval && python -m builtin_model.mixture --output DIR --minutes 52
    python eval/quality/mixture_table.py DIR --output eval/results/mixture.json

Neurons inside the experts, whole experts, and both together are cut by second order with a refit; REAP, the number of
tokens and chance remove whole experts without one. One calibration sample of the text that the model was trained on
serves all ways; the perplexity is over documents that it has not seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from protocol import Output, save_json

from builtin_model.dataset import Files
from fbn_prune.data.builtin import SKILLS
from fbn_prune.progress import StageClock
from fbn_prune.recipe import build_recipe
from fbn_prune.runs.mixture_comparison import WAYS, compare_mixture


def main(
    folder: Annotated[Path, typer.Argument(help="What the trainer has written.")],
    shares: Annotated[str, typer.Option(help="Shares of the expert parameters.")] = "0.75,0.5",
    skills: Annotated[str, typer.Option(help="Kinds of its text.")] = ",".join(SKILLS),
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 65536,
    text_tokens: Annotated[int, typer.Option(help="Held-out tokens of each kind.")] = 16384,
    context: Annotated[int, typer.Option(help="Tokens of a block.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the sample and of chance.")] = 0,
    sequential: Annotated[
        bool, typer.Option(help="Only what is refitted, each layer on the cut layers before it.")
    ] = False,
    output: Output = None,
) -> None:
    """Print the table."""
    files, kept = Files(folder), [float(share) for share in shares.split(",")]
    calibrate = tuple(str(files.calibration(skill)) for skill in skills.split(","))
    texts = tuple(str(files.held_out(skill)) for skill in skills.split(","))
    recipe = build_recipe(
        {"model": str(folder / "model"), "calibration": calibrate, "tokens": tokens}
        | {"context": context, "seed": seed, "device": "cpu", "dtype": "float32"}
        | {"sequential": sequential}
    )
    ways = WAYS[:3] if sequential else WAYS
    found = compare_mixture(
        recipe, ways, kept, None, StageClock(), texts=texts, text_tokens=text_tokens
    )
    print(f"| kept (dense {found.dense:.3f}) | {' | '.join(ways)} |")
    print("|---|" + "---:|" * len(ways))
    for share in kept:
        cells = " | ".join(f"{found.cells[way, share]:.3f}" for way in ways)
        print(f"| {share:.0%} | {cells} |")
    facts = found.to_json()
    facts["model"] = folder.name
    save_json(output, facts)


if __name__ == "__main__":
    typer.run(main)
