"""`fbn-prune discover`: find the networks of a model and write them, without pruning."""

from __future__ import annotations

from typing import Any

from fbn_prune.cli import console, inspect
from fbn_prune.cli.options import (
    CALIBRATION_FLAGS,
    DISCOVERY_FLAGS,
    MODEL_FLAGS,
    OUTPUT_FLAGS,
    Json,
    recipe_flags,
)
from fbn_prune.cli.streams import finished
from fbn_prune.recipe import build_recipe


@recipe_flags(
    *(*MODEL_FLAGS, "memory_budget", *CALIBRATION_FLAGS, *DISCOVERY_FLAGS, *OUTPUT_FLAGS),
    shown=DISCOVERY_FLAGS,
)
def command(*, json: Json = False, flags: dict[str, Any]) -> None:
    """Find the networks of a model and write them to OUTPUT/networks.safetensors."""
    recipe = build_recipe({"keep_networks": 1, **flags})
    from fbn_prune import api

    networks, path = api.discover_checkpoint(recipe, display=console.display())
    with finished(path):
        inspect.show(networks, path, json=json, most=recipe.networks)
