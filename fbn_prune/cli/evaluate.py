"""`fbn-prune evaluate`: evaluate a checkpoint, or two, with lm-evaluation-harness."""

from __future__ import annotations

import io
import json as json_text
import signal
import sys
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fbn_prune.cli import console
from fbn_prune.cli.options import (
    BatchSize,
    Fewshot,
    Json,
    Limit,
    MaxLength,
    Tasks,
    recipe_flags,
    task_names,
)
from fbn_prune.cli.streams import finished
from fbn_prune.errors import InvalidInput
from fbn_prune.recipe import build_recipe

if TYPE_CHECKING:
    from fbn_prune.api import Evaluation

Compare = Annotated[
    str | None, typer.Option("--compare", help="A second model to evaluate, for comparison.")
]
OutputPath = Annotated[
    Path | None,
    typer.Option("--output-path", help="JSON file for the complete results of the harness."),
]
Samples = Annotated[
    bool, typer.Option("--log-samples", help="Include the result of every question in that file.")
]
Card = Annotated[
    bool, typer.Option("--card", help="Add the results to the README.md of the model's folder.")
]


@recipe_flags("model", "device", "dtype", shown=("dtype",))
def command(
    *,
    tasks: Tasks = None,
    compare: Compare = None,
    limit: Limit = None,
    num_fewshot: Fewshot = None,
    batch_size: BatchSize = "8",
    max_length: MaxLength = None,
    output_path: OutputPath = None,
    log_samples: Samples = False,
    card: Card = False,
    json: Json = False,
    flags: dict[str, Any],
) -> None:
    """Evaluate a checkpoint with lm-evaluation-harness, and optionally a second one for comparison."""
    recipe = build_recipe(flags)
    names = task_names(tasks or ["builtin"])
    if log_samples and output_path is None:
        raise InvalidInput("--log-samples: name the file for them with --output-path")
    readme = Path(recipe.model) / "README.md"
    if card and not readme.is_file():
        raise InvalidInput(
            f"--card: there is no {readme}; leave it out, or evaluate the output of a run"
        )
    from fbn_prune import api

    models = [recipe.model] if compare is None else [recipe.model, compare]
    api.check_models(models)
    api.check_measured((), names)
    api.check_results(output_path)
    # The harness ends its helper processes with this signal; our own handler would keep them alive.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    options = api.HarnessOptions(
        limit, num_fewshot, batch_size, log_samples, recipe.device, recipe.dtype, max_length
    )
    # The harness prints, and draws progress bars even without a terminal; it raises its errors.
    quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    with quiet, redirect_stdout(sys.stderr):
        evaluations = api.evaluate(models, names, options)
    result: dict[str, Any] = evaluations[0].to_json()
    if compare is not None:
        result["compare"] = evaluations[1].to_json()
    if output_path is not None:
        raw = {one.model: one.raw for one in evaluations}
        text = json_text.dumps(raw, indent=1, default=str, ensure_ascii=False)
        output_path.write_text(text + "\n", encoding="utf-8")
    if card:
        api.write_evaluation_card(readme, evaluations)
    with nullcontext() if output_path is None else finished(output_path):
        if json:
            console.print_json(result)
        else:
            _show(evaluations)


def _show(evaluations: list[Evaluation]) -> None:
    from fbn_prune.api import evaluation_table

    headings, rows = evaluation_table(evaluations)
    table = Table(title=" beside ".join(one.model for one in evaluations), title_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print_table(table)
