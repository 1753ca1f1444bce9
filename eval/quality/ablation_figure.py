"""Draw the results of `fbn-prune ablate --json`: each network, growing sets of networks, and their effect on each text.

    fbn-prune ablate --rank knockout --text builtin --grow 1,2,4,8,16,32 --components --json > RESULT.json
    python eval/quality/ablation_figure.py RESULT.json FIGURE.svg

The result must hold growing sets and components. The same result gives the same bytes.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from matplotlib.axes import Axes

matplotlib.use("svg")
import matplotlib.pyplot as plt

NETWORKS, RANDOM, COMPONENTS = "#1f5fa8", "#8a8a8a", "#c4622d"
SHOWN = 10
"""Number of networks whose effect is shown for each text."""


def draw_each(axes: Axes, facts: dict[str, Any]) -> None:
    """Draw the perplexity with each network masked, strongest first, over the band of random sets."""
    component = "a principal component, as many neurons as the strongest network"
    for kind, colour, label in (
        ("networks", NETWORKS, "a network"),
        ("components", COMPONENTS, component),
    ):
        values = sorted((entry["perplexity"] for entry in facts[kind]), reverse=True)
        axes.plot(range(1, len(values) + 1), values, ".-", color=colour, label=label)
    band = facts["random"]
    axes.axhspan(band["mean"] - band["std"], band["mean"] + band["std"], color=RANDOM, alpha=0.35)
    axes.axhline(band["mean"], color=RANDOM, label=f"{band['n']} random sets, mean ± deviation")
    axes.axhline(facts["dense"], color="black", linestyle=":", label="unchanged")
    axes.set(xlabel="place", ylabel="perplexity", title="one masked")
    axes.legend(fontsize=7, frameon=False)


def draw_growing(axes: Axes, facts: dict[str, Any], name: str) -> None:
    """Draw the perplexity with the top n networks masked or retained, and both controls of equal size."""
    steps = facts["growing"][name]
    sizes = [step["n"] for step in steps]
    mean, std = ([step["random"][key] for step in steps] for key in ("mean", "std"))
    low = [max(m - s, facts["dense"] / 2) for m, s in zip(mean, std, strict=True)]
    high = [m + s for m, s in zip(mean, std, strict=True)]
    axes.fill_between(sizes, low, high, color=RANDOM, alpha=0.35, linewidth=0)
    axes.plot(sizes, mean, color=RANDOM, label="random sets")
    components = [step["components"]["perplexity"] for step in steps]
    axes.plot(sizes, components, ".-", color=COMPONENTS, label="principal components")
    networks = [step["perplexity"] for step in steps]
    axes.plot(sizes, networks, ".-", color=NETWORKS, label="networks")
    axes.axhline(facts["dense"], color="black", linestyle=":", label="unchanged")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{step['n']}\n({step['neurons']})" for step in steps])
    axes.set(xlabel="top n networks (their neurons)", ylabel="perplexity")
    axes.set_title(f"{name} the top n")
    axes.legend(fontsize=7, frameon=False)


def draw_texts(axes: Axes, facts: dict[str, Any]) -> None:
    """Draw how far the loss of each text rises when each of the strongest networks is masked."""
    strongest = _strongest(facts["networks"])
    texts = list(facts["tokens"])
    rises = [[entry["rise_by_text"][text] for text in texts] for entry in strongest]
    top = max(max(row) for row in rises)
    axes.imshow(rises, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    for row, values in enumerate(rises):
        for column, value in enumerate(values):
            dark = value > 0.6 * top
            axes.text(
                column, row, f"{value:+.2f}", ha="center", va="center", fontsize=7,
                color="white" if dark else "black",
            )  # fmt: skip
    axes.set_xticks(range(len(texts)), texts)
    axes.set_yticks(range(len(strongest)), [str(entry["id"]) for entry in strongest])
    shares = [f"{on_one_text(facts[of]):.0%}" for of in ("networks", "components")]
    title = f"loss rise by text, nats: {shares[0]} on one text (components {shares[1]})"
    axes.set(ylabel="network masked", title=title)


def on_one_text(entries: list[dict[str, Any]]) -> float:
    """Return the share of the rise on the text that loses most, averaged over the strongest entries."""
    rises = [
        [max(0.0, rise) for rise in one["rise_by_text"].values()] for one in _strongest(entries)
    ]
    return statistics.fmean(max(rise) / sum(rise) for rise in rises if sum(rise) > 0)


def _strongest(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(entries, key=lambda entry: -entry["rise"])[:SHOWN]


def main(
    result: Annotated[Path, typer.Argument(help="What `ablate --json` printed.")],
    figure: Annotated[Path, typer.Argument(help="SVG to write.")],
) -> None:
    facts = json.loads(result.read_text(encoding="utf-8"))
    style = {"svg.hashsalt": "fbn-prune", "svg.fonttype": "none"}
    matplotlib.rcParams.update({**style, "font.family": "sans-serif", "font.size": 9})
    drawing, ((each, texts), (mask, retain)) = plt.subplots(
        2, 2, figsize=(10, 7.2), layout="constrained"
    )
    draw_each(each, facts)
    draw_texts(texts, facts)
    draw_growing(mask, facts, "mask")
    draw_growing(retain, facts, "retain")
    tokens = sum(facts["tokens"].values())
    drawing.suptitle(
        f"{Path(facts['model']).name}: networks with neurons of |z| ≥ {facts['z']:g}, ranked by "
        f"{facts['rank']}; {tokens:,} tokens"
    )
    drawing.savefig(figure, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
