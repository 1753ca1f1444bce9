"""Print perplexity at equal parameters by what may be removed: neurons, layers, both, tokens as well, heads as well.

    python eval/quality/structures_table.py --model MODEL --calibrate TEXT --params 0.75,0.6,0.5 --output table.json

With optipfair (`pip install 'fbn-prune[real]'`), a row has its depth pruning.
Every cell is one run of `fbn-prune` with `--target-params` at that share of the model's parameters and its settings
otherwise as they are; the perplexity is that on the held-out share of the text, of the checkpoint as it would be
written. Beside it are the seconds of the run as a multiple of the first row's, and for a search the divergence from the
dense model that it predicted and measured. `--sparsity 0.3,0.5` compares the rows that change nothing but neurons at
that share of neurons removed. A table in `--output` goes on where it was interrupted. Searches share their library of
cuts, so the first of them takes longest; a row by itself (`--only`) tells what a run takes.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import optipfair_depth
import typer
from rich.console import Console
from rich.table import Table

from fbn_prune import prune_checkpoint
from fbn_prune.errors import FbnPruneError
from fbn_prune.pruning.layout import LayoutRequest
from fbn_prune.pruning.library import one_library
from fbn_prune.recipe import Recipe
from fbn_prune.runs.choices import layout_request
from fbn_prune.runs.setup import prepare

OPTIPFAIR = "layers, by optipfair"
SEARCHED = {"layout": "ragged", "widths": "search"}
ROWS: dict[str, dict[str, Any]] = {
    "neurons, equal widths": {},
    "neurons, widths by networks": {"layout": "ragged"},
    "neurons, searched widths": SEARCHED,
    "neurons, equal widths, sequential": {"sequential": True},
    "neurons, searched widths, sequential": {**SEARCHED, "sequential": True},
    "layers": {"structures": "layers"},
    "neurons and layers, equal widths": {"structures": "neurons,layers"},
    "neurons and layers": {"structures": "neurons,layers", "layout": "ragged"},
    "neurons and heads, the same in each layer": {"head_sparsity": "least"},
    "heads and attention blocks": {"structures": "heads,attention", "layout": "ragged"},
    "neurons, heads, attention and layers": {
        "structures": "neurons,heads,attention,layers",
        "layout": "ragged",
    },
    "all, with vocabulary": {"structures": "all", "layout": "ragged"},
    OPTIPFAIR: {},
}
NEURONS_ALONE = [name for name in ROWS if name.startswith("neurons, ") and "layers" not in name]


def main(
    model: Annotated[str, typer.Option(help="Checkpoint folder, GGUF file or builtin.")],
    calibrate: Annotated[list[str], typer.Option(help="Calibration text; repeat for several.")],
    params: Annotated[str, typer.Option(help="Shares of all parameters to keep.")] = "",
    sparsity: Annotated[str, typer.Option(help="Shares of the neurons to remove.")] = "",
    tokens: int = 32768,
    context: int | None = None,
    dtype: Annotated[str, typer.Option(help="Type that the model computes in.")] = "auto",
    held_out: Annotated[float | None, typer.Option(help="Share of the text to measure on.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Rows to print; repeat.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON to keep the cells in.")] = None,
) -> None:
    """Fill the table cell by cell."""
    common = {"model": model, "calibration": calibrate, "tokens": tokens, "context": context}
    common |= {"dtype": dtype} | ({} if held_out is None else {"held_out": held_out})
    facts: dict[str, Any] = {"model": Path(model).name, "tokens": tokens, "context": context}
    facts |= {} if dtype == "auto" else {"dtype": dtype}
    facts |= {} if held_out is None else {"held_out": held_out}
    facts["calibration"] = [Path(text).name for text in calibrate]
    cells: dict[str, dict[str, Any]] = {}
    if output is not None and output.exists():
        found = json.loads(output.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in facts} != facts:
            raise typer.BadParameter(f"{output} holds another table: give another file")
        cells = found["cells"]
    budgets = [("params", float(share)) for share in params.split(",") if share]
    budgets += [("sparsity", float(share)) for share in sparsity.split(",") if share]
    todo: list[tuple[str, str, str, float]] = []
    for kind, share in budgets:
        for name in ROWS if kind == "params" else NEURONS_ALONE:
            key = f"{kind} {share:g} / {name}"
            if key not in cells and not (only and name not in only):
                todo.append((key, name, kind, share))
    searched = [
        budgeted({**common, **ROWS[name]}, kind, share)
        for _, name, kind, share in todo
        if name != OPTIPFAIR and searches(ROWS[name])
    ]
    with one_library([*filter(None, map(request_of, searched))]):
        for key, name, kind, share in todo:
            if name == OPTIPFAIR:
                if importlib.util.find_spec("optipfair") is None:
                    continue
                cells[key] = optipfair_depth.cell(common, int(share * parameters(model)))
            else:
                cells[key] = measured(budgeted({**common, **ROWS[name]}, kind, share))
            if output is not None:
                content = json.dumps({**facts, "cells": cells}, indent=1) + "\n"
                output.write_text(content, encoding="utf-8")
    for kind, share in budgets:
        show(f"{kind} {share:g}", cells)


def budgeted(settings: dict[str, Any], kind: str, share: float) -> dict[str, Any]:
    """Return the settings of a recipe for one cell."""
    budget: dict[str, Any] = {"sparsity": share}
    if kind == "params":
        budget = {"target_params": str(int(share * parameters(settings["model"])))}
    if settings.get("head_sparsity") == "least":
        settings = {**settings, "head_sparsity": one_group(settings["model"])}
    return {**settings, **budget, "allow_untrained": True}


def searches(settings: dict[str, Any]) -> bool:
    """Whether the settings of a row have sizes chosen by what they cost."""
    return settings.get("widths") == "search" or "structures" in settings


def request_of(settings: dict[str, Any]) -> LayoutRequest | None:
    """Return what a searched cell asks for; None if it is refused."""
    try:
        return layout_request(prepare(Recipe(**settings)), None, [])
    except FbnPruneError:
        return None


def measured(settings: dict[str, Any]) -> dict[str, Any]:
    """Run one cell; a run that is refused gives its reason."""
    try:
        with tempfile.TemporaryDirectory() as place:
            result = prune_checkpoint(recipe=Recipe(**settings, output=Path(place) / "out"))
    except FbnPruneError as error:
        return {"refused": str(error)}
    seconds = sum(result.stages.values())
    kept = ("perplexity_before", "perplexity_after", "parameters_before", "parameters_after")
    return {name: getattr(result, name) for name in kept} | {
        "seconds": round(seconds, 1),
        "stages": {name: round(took, 1) for name, took in result.stages.items()},
        "forward_seconds": round(result.forward_seconds, 1),
        "widths": result.widths,
        "layers_left_out": result.layers_left_out,
        "head_groups": result.head_groups,
        "trials": result.layout_trials,
        "predicted": None if result.search is None else result.search["predicted"],
        "measured": None if result.search is None else result.search["measured"],
    }


def parameters(model: str) -> int:
    """Return the parameters of a checkpoint."""
    return opened(model).total_parameters


def one_group(model: str) -> float:
    """Return the share of heads that one key-value group of each layer is."""
    checkpoint = opened(model)
    return 1 / checkpoint.family.head_shape(checkpoint.config).groups


def opened(model: str) -> Any:
    from fbn_prune.data.builtin import model_path
    from fbn_prune.model.checkpoint import Checkpoint

    return Checkpoint.open(model_path() if model == "builtin" else Path(model))


def show(budget: str, cells: dict[str, dict[str, Any]]) -> None:
    """Print the rows of one budget."""
    found = {
        name.partition(" / ")[2]: cell
        for name, cell in cells.items()
        if name.startswith(f"{budget} / ")
    }
    if not found:
        return
    first = next(iter(found.values())).get("seconds")
    table = Table(
        "what may go", "parameters", "perplexity", "excess", "time", "predicted / measured"
    )
    excess = None
    for name, cell in found.items():
        if "refused" in cell:
            table.add_row(name, "", cell["refused"], "", "", "")
            continue
        over = cell["perplexity_after"] - cell["perplexity_before"]
        excess = over if excess is None else excess
        predicted = ""
        if cell["predicted"] is not None:
            predicted = f"{cell['predicted']:.3f} / {cell.get('measured') or min(cell['trials'].values()):.3f}"
        table.add_row(
            name,
            f"{cell['parameters_after']:,}",
            f"{cell['perplexity_after']:.2f}",
            f"{over / excess:.2f}",
            f"{cell['seconds'] / first:.2f}" if first else "",
            predicted,
        )
    dense = next((cell["perplexity_before"] for cell in found.values() if "seconds" in cell), None)
    console = Console()
    console.print(f"{budget}: dense {dense:.2f}" if dense else budget)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
