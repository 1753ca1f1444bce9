"""`fbn-prune compare`: all criteria at several budgets, on one calibration sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fbn_prune.cli import console
from fbn_prune.cli.options import STUDY_FLAGS, Json, recipe_flags
from fbn_prune.errors import InvalidInput
from fbn_prune.recipe import build_recipe

Criteria = Annotated[
    str | None, typer.Option("--criteria", help="Names, divided by commas. Default: all.")
]
Kept = Annotated[
    str,
    typer.Option(
        "--kept",
        help="Shares of MLP neurons to keep, or numbers of networks (their members are the budget), divided by commas.",
    ),
]
OutputPath = Annotated[
    Path | None,
    typer.Option(
        "--output-path",
        help="JSON file of the results, written as they come; the same command goes on from it. "
        "The plot is written beside it, as SVG.",
    ),
]


@recipe_flags(*STUDY_FLAGS, "width_multiple", "damping", "refit_damping", shown=("networks_from",))
def command(
    *,
    criteria: Criteria = None,
    kept: Kept = "0.7,0.5,0.3",
    output_path: OutputPath = None,
    json: Json = False,
    flags: dict[str, Any],
) -> None:
    """Compare all criteria at several budgets on one calibration: held-out perplexity, uniform widths."""
    recipe = build_recipe(flags)
    try:
        shares = [float(part) for part in kept.split(",")]
    except ValueError:
        raise InvalidInput(
            f"--kept {kept}: write shares, as 0.7,0.5,0.3, or numbers of networks"
        ) from None
    names = [name.strip() for name in criteria.split(",")] if criteria else []
    from fbn_prune.progress import StageClock
    from fbn_prune.runs.compare import run_comparison

    clock = StageClock(console.display())
    comparison = run_comparison(recipe, names, shares, output_path, clock)
    if json:
        console.print_json(comparison.to_json())
        return
    shown = comparison.to_json()
    table = Table(
        title=f"{recipe.model}: perplexity, dense {shown['dense']:.3f}", title_justify="left"
    )
    columns = sorted({name for name, _ in comparison.cells})
    for heading in ("kept", *columns):
        table.add_column(heading, justify="right")
    for budget in shown["budgets"]:
        values = [f"{budget['perplexity'][name]:.3f}" for name in columns if budget["perplexity"]]
        if values:
            by = "" if budget["networks"] is None else f" ({budget['networks']} networks)"
            table.add_row(f"{budget['kept']:.0%}{by}", *values)
    console.print_table(table)
