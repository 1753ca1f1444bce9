"""Tables of evaluation results, for the terminal and for model cards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fbn_prune.export.published import public_name
from fbn_prune.runs.evaluate import Evaluation, Figure

HEADING = "## Evaluation"


def evaluation_table(evaluations: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of a table: a row per metric, a column per model, and the difference of two models.

    Parameters
    ----------
    evaluations
        One per model; the first one decides which metrics are listed.
    """
    headings = ["task", "metric", *(one.model for one in evaluations)]
    if len(evaluations) == 2:
        headings.append("difference")
    others = [{(f.task, f.metric): f for f in one.figures} for one in evaluations[1:]]
    body = []
    for figure in evaluations[0].figures:
        key = (figure.task, figure.metric)
        beside = [other[key] for other in others if key in other]
        cells = [figure.task, figure.metric, *map(_cell, (figure, *beside))]
        if beside:
            cells.append(f"{figure.value - beside[0].value:+.4f}")
        body.append(cells)
    return headings, body


def with_evaluation(card: str, evaluations: Sequence[Evaluation]) -> str:
    """Return the model card with its evaluation section added or replaced."""
    named = [replace(one, model=public_name(one.model)) for one in evaluations]
    headings, body = evaluation_table(named)
    lines = [
        HEADING,
        "",
        "Measured with lm-evaluation-harness; ± one standard error.",
        "",
        _markdown(headings),
        _markdown(["---"] * len(headings)),
        *map(_markdown, body),
        "",
    ]
    before, found, rest = card.partition(f"\n{HEADING}\n")
    after = ""
    if found:
        _, following, tail = rest.partition("\n## ")
        after = following + tail
    return before.rstrip("\n") + "\n\n" + "\n".join(lines) + after


def write_evaluation_card(readme: Path, evaluations: Sequence[Evaluation]) -> None:
    """Add the results to a model card, or replace those it has.

    Parameters
    ----------
    readme
        The `README.md` of the evaluated model's folder.
    evaluations
        See :func:`evaluation_table`.
    """
    card = readme.read_text(encoding="utf-8")
    readme.write_text(with_evaluation(card, evaluations), encoding="utf-8")


def _cell(figure: Figure) -> str:
    error = "" if figure.stderr is None else f" ± {figure.stderr:.4f}"
    return f"{figure.value:.4f}{error}"


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
