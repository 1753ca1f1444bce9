"""`fbn-prune compare`: measure all criteria at several budgets, on one calibration sample."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fbn_prune.cli import console
from fbn_prune.cli.options import STUDY_FLAGS, Json, recipe_flags
from fbn_prune.cli.streams import finished
from fbn_prune.errors import InvalidInput
from fbn_prune.recipe import Recipe, build_recipe

if TYPE_CHECKING:
    from fbn_prune.api import Comparison

Criteria = Annotated[
    str | None, typer.Option("--criteria", help="Criteria, separated by commas. Default: all.")
]
Kept = Annotated[
    str,
    typer.Option(
        "--kept",
        help="Shares of MLP neurons to keep, or numbers of networks whose members set the size, separated by commas.",
    ),
]
OutputPath = Annotated[
    Path | None,
    typer.Option(
        "--output-path",
        help="JSON file for the results, updated after each measurement; the same command continues from it. "
        "A plot (SVG) is written beside it.",
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
    """Compare the held-out perplexity of all criteria at several budgets, with uniform widths."""
    recipe = build_recipe(flags)
    try:
        shares = [float(part) for part in kept.split(",")]
    except ValueError:
        raise InvalidInput(
            f"--kept {kept}: give shares, as 0.7,0.5,0.3, or numbers of networks"
        ) from None
    names = [name.strip() for name in criteria.split(",")] if criteria else []
    from fbn_prune import api

    comparison = api.compare(recipe, names, shares, output_path, display=console.display())
    with nullcontext() if output_path is None else finished(output_path):
        if json:
            console.print_json(comparison.to_json())
        else:
            _show(recipe, comparison)


def _show(recipe: Recipe, comparison: Comparison) -> None:
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
            networks = "" if budget["networks"] is None else f" ({budget['networks']} networks)"
            table.add_row(f"{budget['kept']:.0%}{networks}", *values)
    console.print_table(table)
