"""The commands: the main job, and one subcommand for each module of this package."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Annotated, Any

import typer

from fbn_prune import cli
from fbn_prune.cli import prune
from fbn_prune.cli.options import ALL_FLAGS, DryRun, Json, Private, PushToHub, recipe_flags
from fbn_prune.distributed import processes
from fbn_prune.errors import InvalidInput

Debug = Annotated[
    bool, typer.Option("--debug", hidden=True, help="Show a traceback when something fails.")
]
Version = Annotated[bool, typer.Option("--version", help="Print the version and exit.")]

EXAMPLES = """Examples:

fbn-prune --keep-networks 10 --output small

fbn-prune --model MODEL --calibration text.txt --sparsity 0.3 --output small

fbn-prune --model MODEL --task examples.jsonl --sparsity 0.75 --output expert
"""

_NO_COMMANDS = ("app", "main", "prune")
"""Modules that are no subcommand: the main job has no name of its own."""


def build_app() -> typer.Typer:
    """Return the command line: the main job, and every module of this package as a command of the module's name.

    A module that has a function `command` is one command; a module that has an `app` is a group of commands.
    """
    app = typer.Typer(
        name="fbn-prune",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        help="Make a causal language model smaller: remove the MLP neurons that matter least, refit the "
        "others, and write a checkpoint. Functional networks set how many stay (--keep-networks), or a "
        "share does (--sparsity).",
        epilog=EXAMPLES,
    )
    app.callback(invoke_without_command=True)(main_job)
    for found in pkgutil.iter_modules(cli.__path__):
        if found.name in _NO_COMMANDS:
            continue
        module = import_module(f"{cli.__name__}.{found.name}")
        if hasattr(module, "command"):
            app.command(found.name.replace("_", "-"))(module.command)
        elif hasattr(module, "app"):
            app.add_typer(module.app, name=found.name)
    return app


@recipe_flags(*ALL_FLAGS)
def main_job(
    typer_context: typer.Context,
    *,
    json: Json = False,
    dry_run: DryRun = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    debug: Debug = False,
    version: Version = False,
    flags: dict[str, Any],
) -> None:
    if processes() > 1 and typer_context.invoked_subcommand not in (None, "run"):
        raise InvalidInput(
            f"{processes()} processes were started, but only the main job and `run` can use several: "
            f"start `{typer_context.invoked_subcommand}` without a launcher"
        )
    if version:
        prune.print_version()
    elif typer_context.invoked_subcommand is None:
        to = prune.Destination(push_to_hub, private)
        prune.command(flags, json=json, dry_run=dry_run, to=to)
    elif flags or json or dry_run or push_to_hub or private:
        own = "--json, --dry-run, --push-to-hub or --private"
        given = ", ".join(f"--{name.replace('_', '-')}" for name in flags) or own
        raise typer.BadParameter(
            f"{given} is given before '{typer_context.invoked_subcommand}': put flags after the command"
        )
