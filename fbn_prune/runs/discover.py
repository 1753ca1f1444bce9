"""Find the functional networks of a checkpoint and write them to a folder."""

from __future__ import annotations

from pathlib import Path

from fbn_prune.errors import InvalidInput
from fbn_prune.export.directory import atomic_directory
from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.progress import StageClock
from fbn_prune.recipe import Recipe
from fbn_prune.runs.opening import open_run
from fbn_prune.runs.second_run import output_locked
from fbn_prune.runs.setup import prepare
from fbn_prune.runs.stages import find_networks


def run_discovery(recipe: Recipe, clock: StageClock) -> tuple[FunctionalNetworks, Path]:
    """Find the networks, measure their recurrence, and write them; see :func:`fbn_prune.api.discover_checkpoint`."""
    if recipe.output is None:
        raise InvalidInput("--output is missing: name the folder to write")
    prepared = prepare(recipe)
    with output_locked(recipe.output):
        networks = find_networks(open_run(prepared, clock), recurrence=True)
        _write(networks, recipe, recipe.output)
    return networks, recipe.output / "networks.safetensors"


def _write(networks: FunctionalNetworks, recipe: Recipe, output: Path) -> None:
    with atomic_directory(output, recipe.overwrite) as folder:
        networks.save(folder / "networks.safetensors")
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
