"""`fbn-prune inspect`: show the networks of a file, and compare them with those of other files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fbn_prune.cli import console
from fbn_prune.cli.options import Json
from fbn_prune.errors import InvalidInput, counted

if TYPE_CHECKING:
    from fbn_prune.api import FunctionalNetworks, Recurrence

Artifact = Annotated[
    Path, typer.Argument(metavar="PATH", help="networks.safetensors, or a folder with this file.")
]
Most = Annotated[int, typer.Option("--most", min=1, help="Largest number of networks to show.")]
Against = Annotated[
    list[Path] | None,
    typer.Option(
        "--against",
        help="Networks to compare with: from other text, a task or another model of equal shape; repeat for several.",
    ),
]

Page = Annotated[
    Path | None,
    typer.Option("--html", help="Also write a page to browse the networks, such as networks.html."),
]
Effects = Annotated[
    Path | None,
    typer.Option("--ablate", help="Output of `ablate --json` on these networks, for --html."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing page.")]

_BARS = " ▁▂▃▄▅▆▇█"


def command(
    path: Artifact,
    *,
    against: Against = None,
    html: Page = None,
    ablate: Effects = None,
    overwrite: Overwrite = False,
    json: Json = False,
    most: Most = 64,
) -> None:
    """Show the networks of a file: size, layers, tokens and contexts, connectivity, recurrence."""
    from fbn_prune.api import FunctionalNetworks, recurrence, write_networks_page

    if ablate is not None and html is None:
        raise InvalidInput(
            f"--ablate {ablate}: the page to write is missing: add --html networks.html"
        )

    def file(given: Path) -> Path:
        return given / "networks.safetensors" if given.is_dir() else given

    networks = FunctionalNetworks.load(file(path))
    others = {
        str(given): recurrence(networks, FunctionalNetworks.load(file(given)))
        for given in against or ()
    }
    if html is not None:
        write_networks_page(networks, html, ablate=ablate, overwrite=overwrite)
    show(networks, file(path), json=json, most=most, others=others)


def show(
    networks: FunctionalNetworks,
    path: Path,
    *,
    json: bool,
    most: int,
    others: dict[str, Recurrence] | None = None,
) -> None:
    """Print the networks as a table or as one JSON object.

    Parameters
    ----------
    networks, path
        The networks and their file.
    json
        Print JSON.
    most
        Largest number of networks to show.
    others
        Comparison with the networks of other files, by path.
    """
    from fbn_prune.api import network_cards

    others = others or {}
    cards = network_cards(networks)[:most]
    if json:
        apart = ("contexts", "driving_tokens", "recurrence")
        header = {k: v for k, v in networks.header.items() if k not in apart}
        matrix = networks.connectivity
        result = {
            "path": str(path),
            "header": header,
            "networks": cards,
            "connectivity": None if matrix is None else matrix.tolist(),
        }
        if others:
            result["against"] = [
                {"path": name, **other.to_json()} for name, other in others.items()
            ]
        console.print_json(result)
        return
    console.print_table(_table(networks, path, cards, others))
    if "recurrence" not in networks.header:
        console.print_line(
            "recurrence was not measured for this file: `fbn-prune discover` measures it"
        )
    for name, other in others.items():
        console.print_line(_verdict(name, other))


def _table(
    networks: FunctionalNetworks,
    path: Path,
    cards: list[dict[str, Any]],
    others: dict[str, Recurrence],
) -> Table:
    table = Table(title=f"{counted(len(networks.maps), 'network')} in {path}", title_justify="left")
    measured = "recurrence" in networks.header
    for column in ("id", "variance", "hubs", "members", "layers"):
        table.add_column(column, justify="right")
    in_experts = any(card["experts_spanned"] is not None for card in cards)
    if in_experts:
        table.add_column("experts", justify="right")
    for column in ("IoU halves", "IoU seeds") if measured else ():
        table.add_column(column, justify="right")
    for place in range(len(others)):
        table.add_column(f"in {place + 1}: IoU", justify="right")
    table.add_column("goes with")
    table.add_column("tokens")
    table.add_column("top tokens in context")
    for card in cards:
        overlaps = [f"{card[key]:.2f}" for key in ("iou_halves", "iou_seeds") if measured]
        for other in others.values():
            partner, overlap = int(other.partner[card["id"]]), float(other.overlap[card["id"]])
            overlaps.append(f"{partner}: {overlap:.2f}")
        table.add_row(
            str(card["id"]),
            f"{card['explained_variance']:.2%}",
            str(card["hubs"]),
            str(card["members"]),
            _profile(card["members_by_layer"]),
            *([str(card["experts_spanned"])] if in_experts else []),
            *overlaps,
            "\n".join(f"{tie['id']} {tie['correlation']:+.2f}" for tie in card["connected"][:2]),
            " ".join(_visible(entry["token"]) for entry in card["tokens"][:4]),
            Text("\n").join(_context(context) for context in card["contexts"][:2]),
        )
    return table


def _profile(members: list[int]) -> str:
    """Return the members of each layer as a row of bars."""
    top = max(*members, 1)
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // top)] for count in members)


def _verdict(name: str, other: Recurrence) -> str:
    facts, count = other.to_json(), len(other.partner)
    ties = facts["connectivity_correlation"]
    words = "" if ties is None else f"; correlation of the connectivities {ties:.2f}"
    return (
        f"{name}: {facts['recurring']} of {count} networks overlap more than chance (IoU {facts['chance_iou']:.2f}), "
        f"mean IoU {facts['mean_iou']:.2f}; {facts['same']} have maps that correlate at 0.9 or more{words}"
    )


def _context(context: dict[str, Any]) -> Text:
    before, token, after = (_visible(str(context[key])) for key in ("before", "token", "after"))
    return Text.assemble(before[-24:], (f"»{token}«", "bold"), after[:16])


def _visible(text: str) -> str:
    return text.replace("\n", "⏎")
