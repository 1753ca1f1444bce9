"""Write `networks.html`: one self-contained file to browse the networks of a model, by word, layer and effect.

All text from models and files is escaped by the template engine. The page's content security policy admits the one
script below by its hash, and no network access.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fbn_prune.errors import InvalidInput
from fbn_prune.export.published import public_name
from fbn_prune.export.report.facts import Ablation, read_ablation
from fbn_prune.export.report.text import visible
from fbn_prune.networks.cards import network_cards
from fbn_prune.networks.functional_networks import FunctionalNetworks

LABEL_TOKENS = 4
"""Tokens that name a network."""

_SCRIPT = """
const get = id => document.getElementById(id);
const all = [...document.querySelectorAll("article")];
function update() {
  const words = get("words").value.toLowerCase().split(/\\s+/).filter(Boolean);
  const layer = get("layer").value, order = get("order").value;
  const text = get("text") ? get("text").value : "", least = get("effect") ? Number(get("effect").value) : 0;
  let shown = 0;
  for (const one of all) {
    const said = one.textContent.toLowerCase();
    one.hidden = !(words.every(word => said.includes(word)) && (layer === "" || one.dataset.layer === layer)
      && (text === "" || one.dataset.text === text) && Number(one.dataset.effect) >= least - (least === 0 ? 1e9 : 0));
    shown += !one.hidden;
  }
  const sign = order === "place" ? 1 : -1;
  all.sort((a, b) => sign * (a.dataset[order] - b.dataset[order]));
  document.querySelector("main").append(...all);
  get("shown").value = shown;
}
document.querySelector("form").addEventListener("input", update);
"""


def write_browser(
    networks: FunctionalNetworks,
    path: Path,
    *,
    ablation: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write the page as a UTF-8 file.

    Parameters
    ----------
    ablation
        JSON of `fbn-prune ablate --json` on the same networks, for their effects; None for a page without.
    overwrite
        Replace an existing file.

    Raises
    ------
    InvalidInput
        The file exists, its folder does not, or the ablation cannot be read or is of other networks.
    """
    if path.exists() and not overwrite:
        raise InvalidInput(f"{path} exists; give another name, or --overwrite")
    if not path.resolve().parent.is_dir():
        raise InvalidInput(f"{path}: there is no folder {path.resolve().parent}: make it first")
    effects = None if ablation is None else read_ablation(ablation)
    count = len(networks.maps)
    if effects is not None and any(not 0 <= (one.id or 0) < count for one in effects.networks):
        raise InvalidInput(f"{ablation} is of other networks: there are {count} here")
    path.write_text(browser_html(networks, effects), encoding="utf-8")


def browser_html(networks: FunctionalNetworks, effects: Ablation | None = None) -> str:
    """Return the page; the same networks and effects give the same text."""
    environment = Environment(
        loader=PackageLoader("fbn_prune.export.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    cards = [_card(card, effects) for card in network_cards(networks)]
    served = sorted({card["serves"] for card in cards if card["serves"]})
    return environment.get_template("networks.html.jinja").render(
        name=public_name(str(networks.header.get("model", "a model"))),
        tokens=f"{int(networks.header.get('tokens', 0)):,}",
        networks=cards,
        layers=sorted({card["layer"] for card in cards}),
        texts=served,
        script=Markup(_SCRIPT),
        script_hash=f"sha256-{digest}",
    )


def _card(card: dict[str, Any], effects: Ablation | None) -> dict[str, Any]:
    members = card["members_by_layer"]
    most = max(*members, 1)
    found = {} if effects is None else {one.id: one for one in effects.networks}
    effect = serves = None
    if (one := found.get(card["id"])) is not None and one.rise_by_text:
        serves = max(one.rise_by_text, key=one.rise_by_text.__getitem__)
        effect = sum(one.rise_by_text.values()) / len(one.rise_by_text)
    return {
        **card,
        "label": [entry["token"] for entry in card["tokens"][:LABEL_TOKENS]],
        "layer": members.index(max(members)),
        "bars": [round(100 * count / most) for count in members],
        "effect": effect,
        "serves": serves,
    }
