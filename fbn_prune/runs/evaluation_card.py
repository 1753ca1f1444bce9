"""Evaluations as a table, on the terminal and in a model card."""

from __future__ import annotations

from collections.abc import Sequence

from fbn_prune.runs.evaluate import Evaluation, Figure

HEADING = "## Evaluation"


def rows(evaluations: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: one row a figure, one column a model, and the difference where there are two."""
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
    """A model card with an evaluation section, in place of the one it may have."""
    headings, body = rows(evaluations)
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


def _cell(figure: Figure) -> str:
    error = "" if figure.stderr is None else f" ± {figure.stderr:.4f}"
    return f"{figure.value:.4f}{error}"


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
