"""`fbn-prune ablate`: mask, retain or amplify networks in the running model and measure the effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from fbn_prune.cli import console
from fbn_prune.cli.options import (
    STUDY_FLAGS,
    BatchSize,
    Fewshot,
    Json,
    Limit,
    Tasks,
    recipe_flags,
    task_names,
)
from fbn_prune.errors import InvalidInput
from fbn_prune.recipe import build_recipe

if TYPE_CHECKING:
    from fbn_prune.api import AblationResult

Action = Annotated[
    Literal["mask", "retain", "amplify"],
    typer.Option(
        "--action",
        help="Zero the networks' neurons, zero all others, or multiply them by --factor.",
    ),
]
Factor = Annotated[float, typer.Option("--factor", help="Factor of --action amplify.")]
Network = Annotated[
    list[int] | None,
    typer.Option(
        "--network", help="Ablate this network; repeat for several. Default: each network."
    ),
]
Z = Annotated[
    float, typer.Option("--z", min=0, help="Smallest absolute z-score of a network's neurons.")
]
Grow = Annotated[
    str | None,
    typer.Option(
        "--grow", help="Also mask, and retain, the strongest n networks together; n as 1,2,4,8."
    ),
]
Draws = Annotated[
    int, typer.Option("--draws", min=1, help="Number of random sets with as many neurons.")
]
Text = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="Text to measure on: [NAME=]FILE, or `builtin` for the skills of the embedded model; repeat for several. "
        "Default: the held-out share of the calibration text.",
    ),
]
TextTokens = Annotated[
    int, typer.Option("--text-tokens", min=8, help="Largest number of tokens of each text.")
]
Components = Annotated[
    bool,
    typer.Option("--components", help="Also ablate principal components of the same space."),
]


@recipe_flags(*STUDY_FLAGS, shown=("networks_from",))
def command(
    *,
    action: Action = "mask",
    factor: Factor = 2.0,
    network: Network = None,
    z: Z = 3.0,
    grow: Grow = None,
    draws: Draws = 20,
    text: Text = None,
    text_tokens: TextTokens = 4096,
    components: Components = False,
    tasks: Tasks = None,
    limit: Limit = None,
    num_fewshot: Fewshot = None,
    batch_size: BatchSize = "8",
    json: Json = False,
    flags: dict[str, Any],
) -> None:
    """Mask, retain or amplify networks in the running model; compare with random sets of as many neurons."""
    recipe = build_recipe(flags)
    sizes = _sizes(grow)
    from fbn_prune import api

    api.check_recipe(recipe, mixtures=True)
    api.check_measured(text or (), task_names(tasks))
    plan = api.AblationPlan(
        action=action,
        factor=factor,
        networks=tuple(network or ()),
        z=z,
        grow=sizes,
        draws=draws,
        texts=tuple(text or ()),
        tokens=text_tokens,
        components=components,
    )
    options = api.HarnessOptions(limit, num_fewshot, batch_size)
    result = api.ablate(recipe, plan, task_names(tasks), options, display=console.display())
    if json:
        console.print_json(result.to_json())
    else:
        _show(result)


def _sizes(grow: str | None) -> tuple[int, ...]:
    if grow is None:
        return ()
    try:
        return tuple(int(part) for part in grow.split(","))
    except ValueError:
        raise InvalidInput(f"--grow {grow}: give numbers of networks, as 1,2,4,8") from None


def _show(result: AblationResult) -> None:
    facts = result.to_json()
    texts = list(facts["tokens"])
    figures = [
        (task, metric) for task, metrics in facts["dense_tasks"].items() for metric in metrics
    ]
    table = Table(
        title=f"{facts['action']} the networks of {facts['model']}: "
        f"perplexity {facts['dense']:.3f} without a change",
        title_justify="left",
    )
    text_headings = [f"{name}, nats" for name in texts]
    task_headings = [f"{task}, {metric}" for task, metric in figures]
    for heading in ("network", "neurons", "perplexity", *text_headings, *task_headings):
        table.add_column(heading, justify="right")

    def row(name: str, entry: dict[str, Any], value: str) -> None:
        rises = [f"{entry['rise_by_text'][text]:+.3f}" for text in texts]
        on_tasks = [_figure(entry["tasks"][task][metric]) for task, metric in figures]
        table.add_row(name, str(entry["neurons"]), value, *rises, *on_tasks)

    if figures:
        unchanged = [_figure(facts["dense_tasks"][task][metric]) for task, metric in figures]
        table.add_row("none", "0", f"{facts['dense']:.3f}", *["+0.000"] * len(texts), *unchanged)
    for entry in sorted(facts["networks"], key=lambda entry: -entry["perplexity"]):
        row(str(entry["id"]), entry, f"{entry['perplexity']:.3f}")
    random = facts["random"]
    row(f"{random['n']} random", random, f"{random['mean']:.3f} ± {random['std']:.3f}")
    console.print_table(table)
    if facts["ratio_to_random"] is not None:
        console.print_line(
            f"network {facts['strongest']} raises perplexity {facts['ratio_to_random']:.1f} times as "
            f"much as random sets with as many neurons in each layer"
        )
    if facts["components"]:
        values = [entry["perplexity"] for entry in facts["components"]]
        console.print_line(
            f"principal components, {facts['components'][0]['neurons']} neurons each: "
            f"perplexity {min(values):.3f} to {max(values):.3f}"
        )
    for name, steps in facts["growing"].items():
        for step in steps:
            console.print_line(_step(name, step, figures))


def _step(name: str, step: dict[str, Any], figures: list[tuple[str, str]]) -> str:
    """Describe one growing set in a line."""
    band, control = step["random"], step["components"]
    parts = [
        f"{name} the top {step['n']}: {step['neurons']} neurons, perplexity {step['perplexity']:.3f}",
        f"random {band['mean']:.3f} ± {band['std']:.3f}",
    ]
    if control is not None:
        parts.append(f"components {control['perplexity']:.3f}")
    for task, metric in figures:
        random = _figure(band["tasks"][task][metric])
        parts.append(f"{task} {metric} {_figure(step['tasks'][task][metric])} (random {random})")
    return "; ".join(parts)


def _figure(value: float | dict[str, float]) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.3f} ± {value['std']:.3f}"
    return f"{value:.3f}"
