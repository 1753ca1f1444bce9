"""Flags that several commands share. Most are generated from the recipe's fields, so flag and recipe key agree."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from fbn_prune.errors import InvalidInput
from fbn_prune.recipe import MODEL, RECIPE_KEYS, Recipe, recipe_setting

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Predict size, memory and time without running.")
]

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        help="FILE.jsonl, FILE.txt, FILE.yaml, builtin (the skills of the embedded model), or the name of a harness "
        "task; repeat, or separate by commas.",
    ),
]
Limit = Annotated[
    float | None, typer.Option("--limit", help="Number of questions per task, or a share below 1.")
]
Fewshot = Annotated[
    int | None, typer.Option("--num-fewshot", min=0, help="Examples in the prompt.")
]
BatchSize = Annotated[str, typer.Option("--batch-size", help="A number, or auto.")]
MaxLength = Annotated[
    int | None,
    typer.Option(
        "--max-length", min=1, help="Longest prompt in tokens. Default: the model's context length."
    ),
]


def task_names(tasks: list[str] | None) -> list[str]:
    """Return the single names in the values of `--tasks`."""
    return [name for entry in tasks or [] for name in entry.split(",") if name]


PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="USER/NAME",
        rich_help_panel=MODEL,
        hidden=True,
        help="Upload the finished output to this repository of the Hugging Face Hub.",
    ),
]
Private = Annotated[
    bool,
    typer.Option(
        "--private",
        rich_help_panel=MODEL,
        hidden=True,
        help="Make the Hub repository private if it is new.",
    ),
]

MODEL_FLAGS = ("model", "allow_untrained", "device", "dtype", "seed")
CALIBRATION_FLAGS = ("calibration", "tokens", "context", "held_out")
DISCOVERY_FLAGS = ("networks", "network_tokens", "scope")
STUDY_FLAGS = (
    *MODEL_FLAGS,
    *CALIBRATION_FLAGS,
    *DISCOVERY_FLAGS,
    "networks_from",
    "keep_networks",
    "rank",
    "task",
    "task_examples",
    "task_networks",
    "task_test",
)
OUTPUT_FLAGS = ("output", "overwrite")
ALL_FLAGS = RECIPE_KEYS


def _help_all(context: typer.Context, given: bool) -> None:
    if given:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        typer.echo(context.get_help())
        raise typer.Exit


HelpAll = Annotated[
    bool,
    typer.Option("--help-all", is_eager=True, callback=_help_all, help="Show all flags and exit."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a recipe key, such as refit_damping=0.01; keys are the flags of --help-all. Repeat for several.",
    ),
]


def recipe_flags(
    *names: str, shown: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds the flags of recipe fields to a command.

    The decorated function gets the values that the user set as `flags`, a dict; it can have other parameters. The
    command also gets `--set KEY=VALUE` for these fields, and `--help-all` to show the flags of advanced keys.

    Parameters
    ----------
    *names
        Fields of the recipe.
    shown
        Advanced keys that `--help` of this command shows as well.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        hints = get_type_hints(function, include_extras=True)
        own = [
            parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(function).parameters.values()
            if parameter.name != "flags"
        ]

        def command(*, set_keys: list[str] | None, help_all: bool, **values: Any) -> Any:
            flags = {name: values.pop(name) for name in names}
            given = {name: value for name, value in flags.items() if value not in (None, [], ())}
            for text in set_keys or ():
                key, value = recipe_setting(text, names)
                if key in given:
                    raise InvalidInput(f"--set {text}: {key} is given twice")
                given[key] = value
            return function(**values, flags=given)

        parameters = [
            *(
                _keyword(name, _flag(name, shown=name in shown), None)
                for name in RECIPE_KEYS
                if name in names
            ),
            *own,
            _keyword("set_keys", Set, None),
            _keyword("help_all", HelpAll, False),
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        command.__name__ = function.__name__
        command.__doc__ = function.__doc__
        return command

    return decorate


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _flag(name: str, *, shown: bool) -> Any:
    field = Recipe.model_fields[name]
    default, place = field.default, field.json_schema_extra
    assert isinstance(place, dict)
    words = field.description or ""
    if default is not None and default is not False:
        value = ", ".join(default) if isinstance(default, tuple) else default
        words += f" Default: {value}."
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        help=words,
        rich_help_panel=str(place["group"]),
        hidden=bool(place["advanced"]) and not shown,
    )
    return Annotated[_flag_type(field.annotation), option]


def _flag_type(annotation: Any) -> Any:
    """Return the field's type for the flag, with None for a flag that the user did not give."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
    if get_origin(annotation) is tuple:
        return list[str] | None
    if get_origin(annotation) is Literal or annotation in (str, int, float, bool, Path):
        return annotation | None
    raise TypeError(f"no flag type for {annotation}")
