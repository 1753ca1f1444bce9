"""`fbn-prune evaluate`: a checkpoint's figures in lm-evaluation-harness, beside another's."""

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
from fbn_prune.errors import FbnPruneError, InvalidInput
from fbn_prune.recipe import build_recipe

if TYPE_CHECKING:
    from fbn_prune.runs.evaluate import Evaluation

Compare = Annotated[str | None, typer.Option("--compare", help="A second model, for comparison.")]
OutputPath = Annotated[
    Path | None,
    typer.Option("--output-path", help="Also write the harness's results here, as JSON."),
]
Samples = Annotated[
    bool, typer.Option("--log-samples", help="Put every question's result into that file.")
]
Card = Annotated[
    bool, typer.Option("--card", help="Add the table to the README.md of the model's folder.")
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
    """Evaluate a checkpoint with lm-evaluation-harness, alone or beside another one."""
    recipe = build_recipe(flags)
    names = task_names(tasks or ["builtin"])
    if log_samples and output_path is None:
        raise InvalidInput("--log-samples: name the file to put them into with --output-path")
    readme = Path(recipe.model) / "README.md"
    if card and not readme.is_file():
        raise InvalidInput(f"--card: there is no {readme}")
    try:
        from fbn_prune.runs.evaluate import HarnessOptions, evaluate, resolve_tasks
    except ImportError as error:
        raise FbnPruneError(f"{error}: pip install 'fbn-prune[eval]'") from None
    import torch

    # The harness ends its helper processes by this signal; our own way of taking it would keep them alive.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    device = recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    options = HarnessOptions(limit, num_fewshot, batch_size, log_samples, device, dtype, max_length)
    resolved = resolve_tasks(names)
    # The harness draws its bars wherever it runs, and prints; what goes wrong it raises.
    quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    with quiet, redirect_stdout(sys.stderr):
        evaluations = [
            evaluate(model, resolved, options)
            for model in (recipe.model, compare)
            if model is not None
        ]
    result: dict[str, Any] = evaluations[0].to_json()
    if compare is not None:
        result["compare"] = evaluations[1].to_json()
    if output_path is not None:
        raw = {one.model: one.raw for one in evaluations}
        text = json_text.dumps(raw, indent=1, default=str, ensure_ascii=False)
        output_path.write_text(text + "\n", encoding="utf-8")
    if card:
        from fbn_prune.runs.evaluation_card import with_evaluation

        text = with_evaluation(readme.read_text(encoding="utf-8"), evaluations)
        readme.write_text(text, encoding="utf-8")
    if json:
        console.print_json(result)
    else:
        _show(evaluations)


def _show(evaluations: list[Evaluation]) -> None:
    from fbn_prune.runs.evaluation_card import rows

    headings, body = rows(evaluations)
    table = Table(title=" beside ".join(one.model for one in evaluations), title_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < 2 else "right", overflow="fold")
    for row in body:
        table.add_row(*row)
    console.print_table(table)
