"""`fbn-prune run RECIPE.yaml`: run the main job from a recipe file; flags override the file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fbn_prune.cli import prune
from fbn_prune.cli.options import ALL_FLAGS, DryRun, Json, Private, PushToHub, recipe_flags
from fbn_prune.recipe import load_recipe

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe to run.")]


@recipe_flags(*ALL_FLAGS)
def command(
    recipe: RecipePath,
    *,
    json: Json = False,
    dry_run: DryRun = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    flags: dict[str, Any],
) -> None:
    """Run the main job from a recipe file; flags override the file."""
    to = prune.Destination(push_to_hub, private)
    prune.execute(load_recipe(recipe, flags), json=json, dry_run=dry_run, to=to)
