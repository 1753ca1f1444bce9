"""Write a page of the results of `claims.py`: one HTML file with figures, bands and tables, without scripts.

    python eval/quality/claims_page.py RESULT.json PAGE.html

The same result gives the same page.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fbn_prune.export.report.figures import drawing

COLOURS = ("#0b6e8e", "#e08e0b", "#7a5195", "#3c8d5a", "#6b7a88")
"""Of networks, principal components, random rotations, temporal ICA and random sets."""


def claims_page(facts: dict[str, Any]) -> str:
    """Return the page; the same facts give the same text."""
    grown: dict[str, Any] = facts.get("grown", {})
    acts = [name for name in next(iter(grown.values()), {}) if name != "neurons"]
    kinds = list(next(iter(grown.values()))[acts[0]]) if acts else []
    rows = [
        {
            "name": f"top {size} {act}",
            "neurons": step["neurons"],
            "cells": [step[act][kind] for kind in kinds],
        }
        for act in acts
        for size, step in grown.items()
    ]
    with drawing():
        figures = {act: Markup(_growing(grown, act, kinds)) for act in acts}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("claims.html.jinja").render(
        model=facts["model"],
        networks=facts["networks"],
        tokens=facts["tokens"],
        perplexity=facts.get("perplexity"),
        strongest=facts.get("strongest"),
        figures=figures,
        kinds=kinds,
        rows=rows,
        recurrence=facts.get("recurrence"),
        seeds=facts.get("seeds"),
    )


def _growing(grown: dict[str, Any], act: str, kinds: list[str]) -> str:
    """Draw the rise by the number of neurons, a line and a band for each basis."""
    from matplotlib import pyplot, rc_context

    figure, axes = pyplot.subplots(figsize=(4.6, 3.2), layout="constrained")
    neurons = [step["neurons"] for step in grown.values()]
    for kind, colour in zip(kinds, COLOURS, strict=True):
        means = [step[act][kind]["mean"] for step in grown.values()]
        spread = [step[act][kind]["std"] for step in grown.values()]
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(neurons, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(neurons, means, "o-", color=colour, label=kind)
    axes.set_xscale("log")
    axes.set_xticks(
        neurons, [f"top {n}\n{step['neurons']:,}" for n, step in grown.items()], minor=False
    )
    axes.minorticks_off()
    axes.set(ylabel="rise of the loss, nats", xlabel="networks and their neurons", ylim=(0, None))
    axes.legend()
    text = io.StringIO()
    with rc_context({"svg.hashsalt": act}):  # ids that do not change, and differ between figures
        figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    svg = text.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)


def main(
    result: Annotated[Path, typer.Argument(help="JSON that claims.py wrote.")],
    page: Annotated[Path, typer.Argument(help="HTML file to write.")],
) -> None:
    page.write_text(claims_page(json.loads(result.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
