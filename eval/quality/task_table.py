"""Print how well a model cut for a task of a few examples does, by how the calibration documents are weighted.

    python eval/quality/task_table.py --model DIR --domain prose=CALIBRATE.txt,EVALUATE.txt --domain code=... \
        [--questions arithmetic]
    python eval/quality/task_table.py --model builtin

Each domain is the task in turn. For each draw of examples a share of the neurons is kept (uniform widths, second order
and refit). The script prints the perplexity on the domain's evaluation text and, where questions are given, the share
answered exactly. The generic documents hold equally many blocks of every domain. The weightings are:

generic             all generic documents alike
examples alone      the task's few blocks
half and half       half the weight to each of these two
oracle              the task's own generic documents and its examples, all alike
networks, K, s      function-matched (`fbn_prune.networks.function_matching`) on the K networks where the task
                    stands out most, with weights of sharpness s
components, K, s    the same with principal components of the same space
mean activations, s by the cosine of the mean activations of all neurons, standardised

`--tune` evaluates on blocks of the calibration text outside the pool, to choose settings without seeing the evaluation
text. Column "own" is the share of the generic documents' weight on the task's domain, "documents" the effective number
of generic documents.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import protocol
import torch
import typer
from rich.console import Console
from rich.table import Table
from task_experiment import Domain, Experiment, Questions, Setting

from fbn_prune.data import builtin
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.perplexity import perplexity
from fbn_prune.networks.function_matching import SHARPNESS

sys.path.append(str(Path(__file__).parents[1]))  # a script's own folder alone is on the path

from builtin_model.measure import exact_share

Row = dict[str, list[float]]


def _domain(text: str) -> Domain:
    name, _, files = text.partition("=")
    calibrate, _, evaluate = files.partition(",")
    if not evaluate:
        raise InvalidInput(f"--domain {text}: write NAME=CALIBRATE,EVALUATE")
    return Domain(name, Path(calibrate), Path(evaluate))


def _builtin_domains() -> list[Domain]:
    held_out = builtin.held_out_files()
    files = builtin.calibration_files().items()
    return [Domain(name, path, held_out[name]) for name, path in files]


def _asked(run: Experiment, place: int, questions: list[str]) -> Questions:
    name = run.domains[place].name
    for entry in questions:
        of, separator, file = entry.partition("=")
        if of == name:
            return run.questions_of(Path(file)) if separator else run.questions(place, 300)
    return []


def _measure(
    run: Experiment, place: int, adapter: ModelAdapter, asked: Questions
) -> dict[str, float]:
    figures = {"perplexity": perplexity(adapter, run.held_out[place])}
    if asked:
        figures["exact"] = exact_share(adapter.model, run.tokenizer, asked)
    return figures


def task_rows(
    run: Experiment,
    place: int,
    kept: float,
    matched: list[int],
    sharpness: list[float],
    asked: Questions,
    only: list[str],
) -> dict[str, Row]:
    """Return for each method and figure one number a draw."""
    results: dict[str, Row] = {}
    known: dict[bytes, dict[str, float]] = {}
    for draw in range(run.setting.draws):
        for method, weights in run.weights_by_method(place, draw, matched, sharpness).items():
            if only and not any(method.startswith(start) for start in only):
                continue
            key = weights.numpy().tobytes()
            if key not in known:
                known[key] = _measure(run, place, run.cut(weights, kept), asked)
            row = known[key] | {
                "own": run.own_share(weights, place),
                "documents": run.effective_documents(weights),
            }
            for column, value in row.items():
                results.setdefault(method, {}).setdefault(column, []).append(value)
    return results


def _cell(values: list[float], style: Callable[[float], str]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{style(statistics.mean(values))} ± {style(spread)}"


def _table(name: str, dense: dict[str, float], rows: dict[str, Row]) -> Table:
    columns = [column for column in next(iter(rows.values())) if column != "documents"]
    shown = ", ".join(f"{figure} {value:.3f}" for figure, value in dense.items())
    table = Table("statistics", *columns, "documents", "to the oracle", title=f"{name}: {shown}")
    oracle = statistics.mean(rows["oracle"]["perplexity"]) if "oracle" in rows else None
    for method, row in rows.items():
        mean = statistics.mean(row["perplexity"])
        beside = "" if oracle is None else f"{mean / oracle - 1:+.1%}"
        cells = [_cell(row[column], lambda value: f"{value:.3f}") for column in columns]
        documents = f"{statistics.mean(row['documents']):.0f}"
        table.add_row(method, *cells, documents, beside)
    return table


def main(
    model: Annotated[str, typer.Option(help="Checkpoint folder, or builtin.")],
    domain: Annotated[
        list[str] | None, typer.Option(help="NAME=CALIBRATE,EVALUATE; repeat for each.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only these domains as task.")] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option(help="NAME of a domain with Q: A: lines, or NAME=FILE.jsonl."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Only methods whose names begin with this.")
    ] = None,
    kept: Annotated[float, typer.Option(help="Share of neurons kept.")] = 0.3,
    context: protocol.Context = 256,
    generic: Annotated[int, typer.Option(help="Generic documents in all.")] = 120,
    examples: Annotated[int, typer.Option(help="Documents of the task.")] = 4,
    draws: Annotated[int, typer.Option(help="Draws of examples.")] = 5,
    networks: int = 64,
    network_tokens: int = 6144,
    matched: Annotated[list[int], typer.Option(help="Networks matched on.")] = [10, 64],  # noqa: B006
    sharpness: Annotated[list[float], typer.Option(help="Steepness of weights.")] = [SHARPNESS],  # noqa: B006
    seed: int = 0,
    tune: Annotated[bool, typer.Option(help="Evaluate on unused calibration text.")] = False,
    output: protocol.Output = None,
) -> None:
    of_builtin = model == "builtin"
    domains = _builtin_domains() if of_builtin else [_domain(text) for text in domain or []]
    asking = list(questions or [])
    if of_builtin:
        asking = [f"{name}={path}" for name, path in builtin.question_files().items()]
    folder = str(builtin.model_path()) if of_builtin else model
    setting = Setting(context, generic, examples, draws, networks, network_tokens, seed, tune)
    run = Experiment(folder, domains, setting)
    console = Console(width=140)
    facts: dict[str, Any] = {"model": Path(model).name, "kept": kept, **vars(setting), "tasks": {}}
    for place, one in enumerate(domains):
        if task and one.name not in task:
            continue
        asked = [] if tune else _asked(run, place, asking)
        rows = task_rows(run, place, kept, matched, sharpness, asked, list(method or []))
        dense = _measure(run, place, run.adapter, asked)
        facts["tasks"][one.name] = {"dense": dense, "questions": len(asked), "methods": rows}
        console.print(_table(one.name, dense, rows))
        protocol.save_json(output, facts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
