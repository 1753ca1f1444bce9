"""The main job: `fbn-prune --keep-networks 10 --model ... --output ...`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fbn_prune.cli import console
from fbn_prune.cli.streams import finished
from fbn_prune.distributed import is_first
from fbn_prune.errors import InvalidInput
from fbn_prune.recipe import Recipe, build_recipe

if TYPE_CHECKING:
    from fbn_prune.api import PruneResult, Recovery


@dataclass(frozen=True)
class Destination:
    """Hub repository for the finished output; not part of a recipe, so that `run recipe.yaml` does not push."""

    repo: str | None
    private: bool

    def __post_init__(self) -> None:
        if self.private and self.repo is None:
            raise InvalidInput("--private needs --push-to-hub USER/NAME")


def command(flags: dict[str, Any], *, json: bool, dry_run: bool, to: Destination) -> None:
    """Run the main job with these flags."""
    execute(build_recipe(flags), json=json, dry_run=dry_run, to=to)


def execute(recipe: Recipe, *, json: bool, dry_run: bool, to: Destination) -> None:
    """Run or predict a recipe and print the result; push the output to the Hub if asked.

    Parameters
    ----------
    recipe
        The recipe.
    json
        Print one JSON object.
    dry_run
        Predict size, memory and time only.
    to
        Hub repository, if any.
    """
    if dry_run:
        if is_first():
            _predict(recipe, json=json)
        return
    if recipe.output is None:
        raise InvalidInput("--output is missing: name the folder to write, or add --dry-run")
    from fbn_prune import api  # loads torch, which takes seconds; --help does without

    if to.repo is not None and is_first():
        api.check_push(to.repo, overwrite=recipe.overwrite)
    display = console.display()
    result = api.prune_checkpoint(recipe=recipe, display=display)
    if not is_first():
        return
    with finished(recipe.output):
        try:
            if to.repo is not None:
                address = api.push_to_hub(
                    recipe.output,
                    to.repo,
                    private=to.private,
                    overwrite=recipe.overwrite,
                    message=f"Pruned with fbn-prune {api.tool_version()}",
                )
                display.note(f"pushed to {address}")
        finally:  # the result of a run whose upload fails is shown too
            if json:
                console.print_json(result.to_json())
            else:
                _print_result(recipe, result)


def _print_result(recipe: Recipe, result: PruneResult) -> None:
    table = Table(title=f"{recipe.model} -> {recipe.output}", title_justify="left")
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = [
        ("parameters", result.parameters_before, result.parameters_after, "{:,}"),
        ("MLP neurons", result.neurons_total, result.neurons_kept, "{:,}"),
        ("perplexity (held out)", result.perplexity_before, result.perplexity_after, "{:.3f}"),
    ]
    if result.experts is not None:
        rows.insert(1, ("experts of a layer", *result.experts, "{:,}"))
    if (found := result.vocabulary) is not None:
        rows.insert(2, ("tokens", found.tokens_before, found.tokens_after, "{:,}"))
    if result.heads_kept < result.heads_total:
        rows.insert(2, ("attention heads", result.heads_total, result.heads_kept, "{:,}"))
    for name, before, after, style in rows:
        table.add_row(name, style.format(before), style.format(after), f"{after / before - 1:+.1%}")
    table.add_row(
        "weights",
        console.size(result.bytes_before),
        console.size(result.bytes_after),
        f"{result.bytes_after / result.bytes_before - 1:+.1%}",
    )
    console.print_table(table)
    kept = ", ".join(str(network) for network in result.kept_networks[:10])
    more = "" if len(result.kept_networks) <= 10 else f" and {len(result.kept_networks) - 10} more"
    if kept:
        console.print_line(f"networks kept: {kept}{more}")
    if (gone := result.forgotten) is not None:
        console.print_line(
            f"forgotten: {gone['how']}; perplexity of the examples set aside "
            f"{gone['perplexity_before']:.3f} -> {gone['perplexity_after']:.3f}; the perplexities above are of the "
            "held-out text unlike them"
        )
    if result.recovery is not None:
        console.print_line(_recovered(result.recovery))
    if result.vocabulary is not None:
        console.print_line(console.vocabulary(asdict(result.vocabulary)))
        console.print_line("the perplexities are those before the vocabulary was trimmed")
    if result.experts is None:
        console.print_line(_widths(result.widths, result.width_rule))
    else:
        console.print_line(f"width of every expert: {result.widths[0]}")
    if result.layers_left_out:
        console.print_line(f"layers left out: {', '.join(map(str, result.layers_left_out))}")
    if (groups := result.head_groups) is not None:
        console.print_line(_head_groups(groups))
        if len(set(result.widths)) == 1 and len(set(groups)) > 1:
            console.print_line("loads with trust_remote_code=True")
    seconds = ", ".join(f"{name} {took:.1f} s" for name, took in result.stages.items())
    console.print_line(
        f"{seconds}; peak memory {console.size(result.peak_memory_bytes)}; "
        f"bare forward passes {result.forward_seconds:.1f} s"
    )


def _head_groups(groups: list[int]) -> str:
    """One line on the attention of the layers that stay."""
    without = [layer for layer, kept in enumerate(groups) if kept == 0]
    fewer = [layer for layer, kept in enumerate(groups) if 0 < kept < max(groups)]
    parts = [
        f"{what}: layers {', '.join(map(str, layers))}"
        for what, layers in (("no attention", without), ("fewer attention heads", fewer))
        if layers
    ]
    return f"{'; '.join(parts)} of the pruned model" if parts else "all attention heads are kept"


def _recovered(recovery: Recovery) -> str:
    closed = (
        "" if recovery.gap_closed is None else f", {recovery.gap_closed:.0%} of the gap to dense"
    )
    cut, recovered = recovery.perplexity_cut, recovery.perplexity_recovered
    if recovered is None:
        return "recovery not kept: it ended in NaN or Inf"
    if not recovery.kept:
        return f"recovery not kept: it raised the perplexity from {cut:.3f} to {recovered:.3f}"
    return f"recovery took the perplexity from {cut:.3f} to {recovered:.3f}{closed}"


def _widths(widths: list[int], rule: str) -> str:
    if len(set(widths)) == 1:
        return f"width of every layer: {widths[0]}"
    listed = ", ".join(str(width) for width in widths)
    return f"widths by {rule}: {listed}; loads with trust_remote_code=True"


def print_version() -> None:
    """Print the installed version."""
    from fbn_prune.api import tool_version

    console.print_line(tool_version())


def _predict(recipe: Recipe, *, json: bool) -> None:
    from fbn_prune.api import predict

    predicted = predict(recipe)
    if json:
        console.print_json(predicted.to_json())
        return
    table = Table(title=f"dry run: {recipe.model}", title_justify="left")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")

    def about(name: str, text: str) -> str:
        return f"about {text}" if name in predicted.estimated else text

    table.add_row(
        "parameters",
        f"{predicted.parameters_before:,}",
        about("parameters_after", f"{predicted.parameters_after:,}"),
    )
    for part, parameters in predicted.structures.items():
        share = parameters / predicted.parameters_before
        table.add_row(f"  {part}", f"{parameters:,} ({share:.0%})", "")
    table.add_row(
        "MLP neurons",
        f"{predicted.neurons_total:,}",
        about("neurons_kept", f"{predicted.neurons_kept:,}"),
    )
    if predicted.heads_kept < predicted.heads_total:
        kept = about("heads_kept", f"{predicted.heads_kept:,}")
        table.add_row("attention heads", f"{predicted.heads_total:,}", kept)
    if (found := predicted.vocabulary) is not None:
        table.add_row("tokens", f"{found.tokens_before:,}", f"{found.tokens_after:,}")
        table.add_row("", "", console.vocabulary(asdict(found)))
    table.add_row(
        "weights",
        console.size(predicted.bytes_before),
        about("bytes_after", console.size(predicted.bytes_after)),
    )
    for key, value in predicted.same_budget.items():
        shown = console.size(int(value)) if key == "target_size" else f"{value:,}"
        table.add_row(f"  as --{key.replace('_', '-')}", "", about("same_budget", shown))
    table.add_row("peak memory", "", f"about {console.size(predicted.peak_memory_bytes)}")
    table.add_row("", "", predicted.memory)
    low, high = predicted.seconds_low, predicted.seconds_high
    known = low is not None and high is not None
    table.add_row(
        "time",
        "",
        f"roughly {low:.0f} to {high:.0f} s" if known else "unknown: no layer was timed",
    )
    console.print_table(table)
