"""`fbn-prune ablate`: mask, retain alone or amplify networks in the running model, and measure what that does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from fbn_prune.cli import console
from fbn_prune.cli.options import STUDY_FLAGS, Json, recipe_flags
from fbn_prune.errors import InvalidInput
from fbn_prune.recipe import build_recipe

if TYPE_CHECKING:
    from fbn_prune.studies import AblationResult

Action = Annotated[
    Literal["mask", "retain", "amplify"],
    typer.Option("--action", help="Silence the neurons, silence all others, or multiply them."),
]
Factor = Annotated[float, typer.Option("--factor", help="What `amplify` multiplies by.")]
Network = Annotated[
    list[int] | None,
    typer.Option("--network", help="Ablate this network; repeat for several. Default: each."),
]
Z = Annotated[
    float, typer.Option("--z", min=0, help="A network's neurons: abs z-score of at least this.")
]
Grow = Annotated[
    str | None,
    typer.Option("--grow", help="Mask, and retain, the top n networks: sizes n, as 1,2,4,8."),
]
Draws = Annotated[int, typer.Option("--draws", min=1, help="Random sets of equal size.")]
Text = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="Measure on [NAME=]FILE, or the skills of `builtin`; repeat for several. "
        "Default: the calibration text's held-out share.",
    ),
]
TextTokens = Annotated[
    int, typer.Option("--text-tokens", min=8, help="Tokens of each text to measure on.")
]
Components = Annotated[
    bool,
    typer.Option("--components", help="Ablate principal components of the same space as well."),
]


@recipe_flags(*STUDY_FLAGS)
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
    json: Json = False,
    flags: dict[str, Any],
) -> None:
    """Mask, retain alone or amplify networks at run time; perplexity against random sets of equal size."""
    recipe = build_recipe(flags)
    sizes = _sizes(grow)
    from fbn_prune.progress import StageClock
    from fbn_prune.studies import AblationPlan, run_ablation

    plan = AblationPlan(
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
    result = run_ablation(recipe, plan, StageClock(console.display()))
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
        raise InvalidInput(f"--grow {grow}: write numbers of networks, as 1,2,4,8") from None


def _show(result: AblationResult) -> None:
    facts = result.to_json()
    texts = list(facts["tokens"])
    table = Table(
        title=f"{facts['action']} the networks of {facts['model']}: "
        f"perplexity {facts['dense']:.3f} unchanged",
        title_justify="left",
    )
    for heading in ("network", "neurons", "perplexity", *(f"{name}, nats" for name in texts)):
        table.add_column(heading, justify="right")

    def row(name: str, entry: dict[str, Any], value: str) -> None:
        rises = [f"{entry['rise_by_text'][text]:+.3f}" for text in texts]
        table.add_row(name, str(entry["neurons"]), value, *rises)

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
            band = step["random"]
            console.print_line(
                f"{name} the top {step['n']}: {step['neurons']} neurons, perplexity "
                f"{step['perplexity']:.3f}; random {band['mean']:.3f} ± {band['std']:.3f}"
            )
