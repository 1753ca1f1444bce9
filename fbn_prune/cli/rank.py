"""`fbn-prune rank`: list the networks of a model in the order in which they would be kept."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from fbn_prune.cli import console
from fbn_prune.cli.options import STUDY_FLAGS, Json, recipe_flags
from fbn_prune.recipe import build_recipe

_UNITS = {
    "energy": "output energy",
    "knockout": "loss rise (nats)",
    "task": "standard deviations from generic text",
}


@recipe_flags(*STUDY_FLAGS, shown=("networks_from", "rank"))
def command(*, json: Json = False, flags: dict[str, Any]) -> None:
    """Rank the networks of a model by output energy, by knock-out, or by a task."""
    recipe = build_recipe(flags)
    from fbn_prune import api

    ranking = api.rank(recipe, display=console.display())
    if json:
        console.print_json(ranking.to_json())
        return
    table = Table(title=f"networks of {recipe.model} by {ranking.rank}", title_justify="left")
    for heading in ("place", "id", _UNITS[ranking.rank], "hubs", "members", "layers"):
        table.add_column(heading, justify="right")
    for place, row in enumerate(ranking.to_json()["networks"], 1):
        cells = [place, row["id"], f"{row['score']:.4g}", row["hubs"], row["members"]]
        table.add_row(*map(str, cells), str(row["layers_spanned"]))
    console.print_table(table)
