"""`fbn-prune inspect`: what the networks of an artifact are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from fbn_prune.cli import console
from fbn_prune.cli.options import Json

if TYPE_CHECKING:
    from fbn_prune.networks.functional_networks import FunctionalNetworks

Artifact = Annotated[
    Path, typer.Argument(metavar="PATH", help="networks.safetensors, or a folder that holds one.")
]
Most = Annotated[int, typer.Option("--most", min=1, help="Show this many networks.")]


def command(path: Artifact, *, json: Json = False, most: Most = 64) -> None:
    """Show the networks of an artifact: size, layers, top tokens in context, recurrence."""
    from fbn_prune.networks.functional_networks import FunctionalNetworks

    file = path / "networks.safetensors" if path.is_dir() else path
    show(FunctionalNetworks.load(file), file, json=json, most=most)


def show(networks: FunctionalNetworks, path: Path, *, json: bool, most: int) -> None:
    """Print the networks as a table, or as one JSON object."""
    cards = [_card(networks, index) for index in range(min(most, len(networks.maps)))]
    if json:
        header = {k: v for k, v in networks.header.items() if k not in ("contexts", "recurrence")}
        console.print_json({"path": str(path), "header": header, "networks": cards})
        return
    table = Table(title=f"{len(networks.maps)} networks in {path}", title_justify="left")
    measured = "recurrence" in networks.header
    for column in ("id", "variance", "hubs", "members", "layers"):
        table.add_column(column, justify="right")
    for column in ("IoU halves", "IoU seeds") if measured else ():
        table.add_column(column, justify="right")
    table.add_column("top tokens in context")
    for card in cards:
        overlaps = [f"{card[key]:.2f}" for key in ("iou_halves", "iou_seeds") if measured]
        table.add_row(
            str(card["id"]),
            f"{card['explained_variance']:.2%}",
            str(card["hubs"]),
            str(card["members"]),
            str(card["layers_spanned"]),
            *overlaps,
            "\n".join(_context(context) for context in card["contexts"][:2]),
        )
    console.print_table(table)
    if not measured:
        console.print_line("recurrence was not measured here: `fbn-prune discover` measures it")


def _card(networks: FunctionalNetworks, index: int) -> dict[str, Any]:
    recurrence = networks.header.get("recurrence") or {}
    contexts = networks.header.get("contexts") or []
    energy = networks.energy

    def recurrent(key: str) -> float | None:
        values = recurrence.get(key)
        return None if values is None else float(values[index])

    return {
        "id": index,
        "explained_variance": float(networks.explained_variance[index]),
        "energy": None if energy is None else float(energy[index]),
        "hubs": int(networks.hubs(index).sum()),
        "members": int(networks.members(index).sum()),
        "layers_spanned": len(networks.layers_spanned(index)),
        "members_by_layer": [int(count) for count in networks.members_by_layer(index)],
        "iou_halves": recurrent("iou_halves"),
        "iou_seeds": recurrent("iou_seeds"),
        "correlation_seeds": recurrent("correlation_seeds"),
        "contexts": contexts[index] if index < len(contexts) else [],
    }


def _context(context: dict[str, Any]) -> str:
    before, token, after = (
        escape(str(context[key]).replace("\n", "⏎")) for key in ("before", "token", "after")
    )
    return f"{before[-24:]}[bold]»{token}«[/bold]{after[:16]}"
