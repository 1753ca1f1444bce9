"""Entry point of the command line: the main job, the subcommands, and one line for every error."""

from __future__ import annotations

import os
import pkgutil
import signal
import sys
import traceback
from importlib import import_module
from typing import Annotated, Any

import typer

from fbn_prune import cli
from fbn_prune.cli import prune
from fbn_prune.cli.options import ALL_FLAGS, DryRun, Json, Private, PushToHub, recipe_flags
from fbn_prune.cli.quiet import quiet_libraries
from fbn_prune.distributed import is_first, processes
from fbn_prune.errors import FbnPruneError, InvalidInput

Debug = Annotated[
    bool, typer.Option("--debug", hidden=True, help="Show a traceback when something fails.")
]
Version = Annotated[bool, typer.Option("--version", help="Print the version and exit.")]

EXAMPLES = """Examples:

fbn-prune --keep-networks 10 --output small

fbn-prune --model MODEL --calibration text.txt --sparsity 0.3 --output small

fbn-prune --model MODEL --task examples.jsonl --sparsity 0.75 --output expert
"""

_NO_COMMANDS = ("main", "prune")
"""Modules whose `command` is the main job, which has no name of its own."""


def build_app() -> typer.Typer:
    """Return the command line: the main job, and every module of this package as a command of the module's name.

    An underscore in the name of a module is a dash in the name of its command.

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


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with 0 done, 1 failed, 2 bad usage, 130 interrupted or 143 terminated."""
    sys.exit(_exit_code(sys.argv[1:] if arguments is None else arguments))


def _exit_code(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    signal.signal(signal.SIGTERM, _terminated)
    # Progress bars of other libraries would disturb our own.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Must be set before torch loads OpenMP: threads that wait by spinning would take the cores from the thread that
    # they wait for when another program uses some of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with quiet_libraries():
        return _run(arguments, debug)


def _run(arguments: list[str], debug: bool) -> int:
    command = typer.main.get_command(build_app())
    try:
        code = command.main(args=arguments, prog_name="fbn-prune", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except FbnPruneError as error:
        return _fail(error, error.exit_code, debug)
    except KeyboardInterrupt as error:
        return _fail(f"interrupted; {_leftovers(error)}", 130, debug)
    except Terminated as error:
        return _fail(f"terminated; {_leftovers(error)}", 143, debug)
    except MemoryError as error:
        return _fail(f"out of memory: lower --tokens or --context; {_leftovers(error)}", 1, debug)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{place}", 1, debug)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error from typer
            return _fail(error.format_message(), 2, debug)
        if type(error).__name__ == "Abort":
            return _fail(f"interrupted; {_leftovers(error.__cause__)}", 130, debug)
        hint = "" if debug else " (--debug shows where)"
        return _fail(f"{type(error).__name__}: {error}{hint}", 1, debug)


def _fail(message: object, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    # All processes refuse the input for the same reason; one message is enough.
    if code == 2 and not is_first():
        return code
    line = " ".join(str(message).split())
    print(f"fbn-prune: error: {line}", file=sys.stderr)
    return code


class Terminated(BaseException):
    """Raised by SIGTERM, so that temporary folders are removed before the process ends."""


def _terminated(number: int, frame: object) -> None:
    raise Terminated


def _leftovers(error: BaseException | None) -> str:
    """Return what an interrupted run has left on disk."""
    if getattr(error, "resumes", False):
        return "no output was written; the same command continues from the last finished stage"
    return "nothing was written"
