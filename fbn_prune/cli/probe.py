"""`fbn-prune probe`: tell the labels of texts from the activity of a few functional networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fbn_prune.cli import console
from fbn_prune.cli.options import (
    CALIBRATION_FLAGS,
    DISCOVERY_FLAGS,
    MODEL_FLAGS,
    Json,
    recipe_flags,
)
from fbn_prune.recipe import build_recipe

if TYPE_CHECKING:
    from fbn_prune.api import ProbeResult

Labels = Annotated[
    Path,
    typer.Option(
        "--labels",
        help='Labelled texts: rows {"text", "label"} of a JSON lines, CSV or Parquet file.',
    ),
]
Splits = Annotated[
    int, typer.Option("--splits", min=1, help="Random splits of the texts into two halves.")
]


@recipe_flags(
    *MODEL_FLAGS, *CALIBRATION_FLAGS, *DISCOVERY_FLAGS, "networks_from", shown=("networks_from",)
)
def command(
    *, labels: Labels, splits: Splits = 5, json: Json = False, flags: dict[str, Any]
) -> None:
    """Tell the labels of texts from 1, 2 and 5 networks; compare with other descriptions of the same activity."""
    recipe = build_recipe({"keep_networks": 1, **flags})
    from fbn_prune import api

    result = api.probe(recipe, labels, splits=splits, display=console.display())
    if json:
        console.print_json(result.to_json())
    else:
        _show(result)


def _show(result: ProbeResult) -> None:
    facts = result.to_json()
    listed = ", ".join(f"{name} ({count})" for name, count in facts["texts"].items())
    table = Table(
        title=f"{facts['model']}: balanced accuracy of {listed}; chance {facts['chance']:.3f}",
        title_justify="left",
    )
    counts = list(next(iter(facts["descriptions"].values())))
    table.add_column("features")
    for count in counts:
        table.add_column(f"{count} of them" if count != "1" else "the best", justify="right")
    for name, figures in facts["descriptions"].items():
        cells = [f"{figures[count]['mean']:.3f} ± {figures[count]['std']:.3f}" for count in counts]
        table.add_row(name, *cells)
    console.print_table(table)
    for chosen in facts["chosen"][:5]:
        tokens = " ".join(repr(token) for token in chosen["tokens"])
        times = f"chosen in {chosen['splits']} of {facts['splits']} splits"
        console.print_line(f"network {chosen['network']}, {times}: {tokens}")
