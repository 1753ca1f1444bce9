"""`fbn-prune fingerprint`: whether two checkpoints have a common origin, by the networks that they share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fbn_prune.cli import console
from fbn_prune.cli.options import (
    CALIBRATION_FLAGS,
    DISCOVERY_FLAGS,
    MODEL_FLAGS,
    Json,
    recipe_flags,
)
from fbn_prune.recipe import build_recipe

First = Annotated[
    str, typer.Argument(metavar="A", help="Checkpoint folder, GGUF file, Hub id or `builtin`.")
]
Second = Annotated[str, typer.Argument(metavar="B", help="The checkpoint to compare with.")]

_DEFAULTS = {
    "keep_networks": 1,
    "networks": 32,
    "tokens": 4096,
    "network_tokens": 4096,
    "context": 128,
}


@recipe_flags(
    *(flag for flag in MODEL_FLAGS if flag != "model"), *CALIBRATION_FLAGS, *DISCOVERY_FLAGS
)
def command(*, first: First, second: Second, json: Json = False, flags: dict[str, Any]) -> None:
    """Compare the networks of two checkpoints by their activity on the same text; shapes may differ.

    The threshold is that of 32 networks from 4096 tokens, which are found unless --networks, --tokens or
    --network-tokens say otherwise.
    """
    recipe = build_recipe({**_DEFAULTS, **flags, "model": first})
    from fbn_prune import api

    found = api.fingerprint(recipe, second, display=console.display())
    facts = found.to_json()
    if json:
        console.print_json(facts)
        return
    verdict = "related" if facts["related"] else "no sign of a common origin"
    console.print_line(
        f"{verdict}: the spaces that their networks span overlap by {facts['span']:.3f} on "
        f"{facts['words']} words (from {facts['threshold']:.2f} on: related; 0 is chance)"
    )
    console.print_line(
        f"the networks overlap by {facts['score']:.3f}; linear CKA of plain activations {facts['cka']:.3f}"
    )
