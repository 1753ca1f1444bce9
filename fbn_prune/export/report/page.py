"""Write `report.html`, one self-contained file for screen, phone and paper.

The template engine escapes all text from models and files (tokens, contexts, names); visible symbols replace control
characters. A content security policy in the page also forbids scripts and network access.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from fbn_prune.export.published import public_name
from fbn_prune.export.report import figures
from fbn_prune.export.report.facts import (
    Ablation,
    Comparison,
    Evaluation,
    ReportFacts,
    RunResult,
)
from fbn_prune.export.report.text import visible
from fbn_prune.networks.cards import network_cards

REPORT_NAME = "report.html"
FIGURES = (
    "widths",
    "search",
    "structures",
    "recovery",
    "dial",
    "connectivity",
    "quality",
    "quality_by_k",
    "knockout",
    "growing_mask",
    "growing_retain",
)
CONTEXTS_SHOWN = 3
CARDS_SHOWN = 12
"""Number of open cards if no run has selected networks."""
SELECTIVE_SHOWN = 16
"""Number of networks in the ablation table."""


def write_report(facts: ReportFacts, path: Path) -> None:
    """Write the page as a UTF-8 file."""
    path.write_text(report_html(facts), encoding="utf-8")


def report_html(facts: ReportFacts) -> str:
    """Return the page; the same facts give the same text."""
    with figures.drawing():
        drawn: dict[str, Markup | None] = dict.fromkeys(FIGURES)
        drawn |= {name: Markup(svg) for name, svg in _figures(facts).items()}
    return _template().render(
        name=facts.name,
        figures=drawn,
        headline=None if facts.result is None else _headline(facts.result),
        result=facts.result,
        dial=facts.members_kept,
        experts=None if facts.result is None else _experts(facts.result, facts),
        comparison=None if facts.comparison is None else _comparison(facts),
        ablation=None if facts.ablation is None else _ablation(facts.ablation),
        evaluation=None if facts.evaluation is None else _evaluation(facts.evaluation),
        cards=_cards(facts),
        recipe=facts.recipe,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("fbn_prune.export.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    return environment.get_template("page.html.jinja")


def _figures(facts: ReportFacts) -> dict[str, str]:
    drawn: dict[str, str] = {}
    result, networks = facts.result, facts.networks
    if result is not None:
        drawn["widths"] = figures.widths_figure(facts.widths_before, result.neurons_by_layer)
        if result.search is not None and len(result.search.curve) > 1 and result.layout_trials:
            measured = list(result.layout_trials.values())
            drawn["search"] = figures.search_figure(
                result.search.curve,
                result.search.share,
                measured,
                result.search.measured or min(measured),
            )
            if result.search.kept_parts:
                drawn["structures"] = figures.structures_figure(
                    result.search.whole_parts, result.search.kept_parts
                )
        if result.recovery is not None and len(result.recovery.curve) > 1:
            drawn["recovery"] = figures.recovery_figure(result.recovery.curve)
    members = facts.members_kept
    if networks is not None and len(members) > 1:
        kept = None if result is None or _has_own_budget(facts) else len(result.kept_networks)
        drawn["dial"] = figures.dial_figure(members, sum(networks.widths), kept)
    if networks is not None and networks.connectivity is not None and len(members) > 1:
        drawn["connectivity"] = figures.connectivity_figure(networks.connectivity)
    if (comparison := facts.comparison) is not None:
        run = result if _same_text(result, comparison) else None
        drawn["quality"] = figures.quality_figure(comparison, run=run)
        worth = _networks_worth(facts, comparison)
        if any(value is not None for value in worth):
            drawn["quality_by_k"] = figures.quality_figure(comparison, run=None, networks=worth)
    if (ablation := facts.ablation) is not None:
        drawn["knockout"] = figures.knockout_figure(ablation)
        for name, steps in ablation.growing.items():
            if name in ("mask", "retain") and steps:
                drawn[f"growing_{name}"] = figures.growing_figure(name, steps, ablation.dense)
    return drawn


def _has_own_budget(facts: ReportFacts) -> bool:
    """Return whether the size was set directly and not by the kept networks."""
    result = facts.result
    return result is None or not 0 < len(result.kept_networks) < len(facts.order)


def _same_text(result: RunResult | None, comparison: Comparison) -> bool:
    fingerprint = comparison.facts.get("calibration_fingerprint")
    return result is not None and fingerprint == result.calibration_fingerprint


def _networks_worth(facts: ReportFacts, comparison: Comparison) -> list[float | None]:
    """Return for each budget the K with as many members; None where there is no such K."""
    members = facts.members_kept
    worth: list[float | None] = []
    for budget in comparison.budgets:
        if budget.networks is not None:
            worth.append(float(budget.networks))
        elif facts.networks is None or not members:
            worth.append(None)
        else:
            neurons = budget.kept * sum(facts.networks.widths)
            inside = members[0] <= neurons <= members[-1]
            numbers = np.arange(1, len(members) + 1)
            worth.append(float(np.interp(neurons, members, numbers)) if inside else None)
    return worth


def _experts(result: RunResult, facts: ReportFacts) -> dict[str, Any] | None:
    """Return what a mixture's layers have kept; None for other models."""
    if result.experts is None:
        return None
    before, after = result.experts
    full = facts.widths_before[0] // before
    rows = [
        {"layer": layer, "kept": len(kept), "experts": ", ".join(map(str, kept))}
        for layer, kept in facts.kept_experts.items()
    ]
    return {
        "before": before,
        "after": after,
        "width": result.widths[0],
        "full": full,
        "rows": rows if after < before else [],
    }


def _headline(result: RunResult) -> list[dict[str, str]]:
    def row(name: str, before: float, after: float, form: str) -> dict[str, str]:
        change = f"{100 * (after / before - 1):+.1f} %" if before else ""
        cells = {"before": form.format(before), "after": form.format(after)}
        return {"name": name, **cells, "change": change}

    rows = [
        row("parameters", result.parameters_before, result.parameters_after, "{:,}"),
        row("MLP neurons", result.neurons_total, result.neurons_kept, "{:,}"),
        row("weights, MB", result.bytes_before / 1e6, result.bytes_after / 1e6, "{:,.1f}"),
        row("perplexity", result.perplexity_before, result.perplexity_after, "{:,.3f}"),
    ]
    if (found := result.vocabulary) is not None:
        rows.insert(2, row("tokens", found.tokens_before, found.tokens_after, "{:,}"))
    if result.experts is not None:
        rows.insert(1, row("experts of a layer", *result.experts, "{:,}"))
    if result.heads_kept < result.heads_total:
        rows.insert(2, row("attention heads", result.heads_total, result.heads_kept, "{:,}"))
    if result.recovery is not None and result.recovery.kept:
        healed, closed = result.recovery, result.recovery.gap_closed
        gap = "" if closed is None else f"{100 * closed:.0f} % of the loss healed"
        cut = {"before": f"{healed.perplexity_cut:,.3f} when cut"}
        rows.append(
            {"name": "perplexity, healed", "after": rows[-1]["after"], **cut, "change": gap}
        )
    task = result.task or {}
    if task.get("test_perplexity_before") is not None:
        before, after = task["test_perplexity_before"], task["test_perplexity_after"]
        rows.append(row("perplexity, task's questions", before, after, "{:,.3f}"))
    return rows


def _comparison(facts: ReportFacts) -> dict[str, Any]:
    comparison = facts.comparison
    assert comparison is not None
    rows = []
    for budget in sorted(comparison.budgets, key=lambda budget: -budget.kept):
        values = [budget.perplexity.get(name) for name in comparison.criteria]
        best = min((v for v in values if v is not None), default=None)
        cells = [
            {"text": "" if v is None else f"{v:,.2f}", "best": v is not None and v == best}
            for v in values
        ]
        rows.append({"kept": f"{budget.kept:.1%}", "networks": budget.networks, "cells": cells})
    return {
        "model": public_name(comparison.model),
        "dense": f"{comparison.dense:,.2f}",
        "criteria": comparison.criteria,
        "rows": rows,
        "same_text": _same_text(facts.result, comparison),
    }


def _ablation(ablation: Ablation) -> dict[str, Any]:
    texts = list(ablation.tokens)
    tasks = [(task, metric) for task, metrics in ablation.dense_tasks.items() for metric in metrics]
    few = ablation.strongest_first[:SELECTIVE_SHOWN]
    most = max((abs(v) for one in few for v in one.rise_by_text.values()), default=0.0)

    def cells(rises: dict[str, float]) -> list[dict[str, str]]:
        return [
            {"text": f"{rises[name]:+.3f}", "tint": _tint(rises[name], most)}
            if name in rises
            else {"text": "", "tint": "0"}
            for name in texts
        ]

    rows = [
        {
            "name": "" if one.id is None else str(one.id),
            "neurons": one.neurons,
            "perplexity": f"{one.perplexity:,.3f}",
            "cells": cells(one.rise_by_text),
            "tasks": [f"{one.tasks[task][metric]:.3f}" for task, metric in tasks],
        }
        for one in few
    ]
    band = ablation.random
    random = {
        "name": f"{band.n} random",
        "neurons": band.neurons,
        "perplexity": f"{band.mean:,.3f} ± {band.std:.3f}",
        "cells": cells(band.rise_by_text),
        "tasks": [
            f"{band.tasks[task][metric].mean:.3f} ± {band.tasks[task][metric].std:.3f}"
            for task, metric in tasks
        ],
    }
    unchanged = {
        "name": "unchanged",
        "neurons": 0,
        "perplexity": f"{ablation.dense:,.3f}",
        "cells": cells({}),
        "tasks": [f"{ablation.dense_tasks[task][metric]:.3f}" for task, metric in tasks],
    }
    ratio = ablation.ratio_to_random
    return {
        "model": public_name(ablation.model),
        "action": {"mask": "silenced", "retain": "kept alone"}.get(ablation.action, "amplified"),
        "dense": f"{ablation.dense:,.3f}",
        "rank": f" by {ablation.rank}" if ablation.rank else "",
        "texts": texts,
        "tasks": [f"{task}, {metric}" for task, metric in tasks],
        "rows": [*rows, random, unchanged],
        "left_out": len(ablation.networks) - len(few),
        "ratio": None if ratio is None else f"{ratio:,.1f}",
        "components": bool(ablation.components),
    }


def _tint(value: float, most: float) -> str:
    """Return the opacity of a cell's colour; only rises are coloured."""
    return f"{0.6 * min(max(value / most, 0.0), 1.0):.2f}" if most > 0 else "0"


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    beside = evaluation.compare
    rows = []
    for task, metrics in evaluation.tasks.items():
        for metric, figure in metrics.items():
            other = None if beside is None else beside.tasks.get(task, {}).get(metric)
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "value": _with_error(figure.value, figure.stderr),
                    "other": "" if other is None else _with_error(other.value, other.stderr),
                    "difference": "" if other is None else f"{figure.value - other.value:+.4f}",
                }
            )
    return {
        "model": public_name(evaluation.model),
        "other": None if beside is None else public_name(beside.model),
        "rows": rows,
    }


def _with_error(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _cards(facts: ReportFacts) -> dict[str, Any]:
    """Return the cards in rank order: first those that the run kept, or else the strongest, then the others."""
    if facts.networks is None:
        return {"title": "", "first": [], "others": []}
    first = set(facts.order[:CARDS_SHOWN])
    title = "The strongest networks"
    if facts.result is not None and not _has_own_budget(facts):
        first, title = set(facts.result.kept_networks), "Networks kept"
    drawn = [
        (network in first, _card(facts, card))
        for network, card in _by_place(facts.order, network_cards(facts.networks))
    ]
    return {
        "title": title,
        "first": [card for shown, card in drawn if shown],
        "others": [card for shown, card in drawn if not shown],
    }


def _by_place(
    order: list[int], cards: list[dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for place, network in enumerate(order, 1):
        yield network, {**cards[network], "place": place}


def _card(facts: ReportFacts, card: dict[str, Any]) -> dict[str, Any]:
    most = max(*card["members_by_layer"], 1)
    ablated = [] if facts.ablation is None else facts.ablation.networks
    alone = [one.perplexity for one in ablated if one.id == card["id"]]
    dense = 0.0 if facts.ablation is None else facts.ablation.dense
    return {
        **card,
        "variance": f"{100 * card['explained_variance']:.2f} %",
        "change": f"{alone[0] - dense:+,.3f}" if alone else None,
        "bars": [round(100 * n / most) for n in card["members_by_layer"]],
        "contexts": card["contexts"][:CONTEXTS_SHOWN],
    }
