"""Flags are made from the recipe's fields, so that a flag and its recipe key cannot drift apart."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from fbn_prune.recipe import Recipe

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Predict size, memory and time; change nothing.")
]

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        help="FILE.jsonl, FILE.txt, FILE.yaml, builtin (the embedded model's skills), or a name that the harness "
        "knows; repeat, or divide by commas.",
    ),
]
Limit = Annotated[
    float | None, typer.Option("--limit", help="Questions of each task, or a share below 1.")
]
Fewshot = Annotated[
    int | None, typer.Option("--num-fewshot", min=0, help="Examples in the prompt.")
]
BatchSize = Annotated[str, typer.Option("--batch-size", help="A number, or auto.")]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=1, help="Longest prompt, in tokens. Default: the model's."),
]


def task_names(tasks: list[str] | None) -> list[str]:
    """The single names in what `--tasks` was given."""
    return [name for entry in tasks or [] for name in entry.split(",") if name]


PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="USER/NAME",
        help="Upload the finished output to this repository of the Hugging Face Hub.",
    ),
]
Private = Annotated[
    bool, typer.Option("--private", help="Make the Hub repository, if it is new, private.")
]

MODEL_FLAGS = ("model", "device", "dtype", "seed")
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
    "task_test",
)
OUTPUT_FLAGS = ("output", "overwrite")
ALL_FLAGS = tuple(Recipe.model_fields)


def recipe_flags(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the flags of these recipe fields; it gets those the user set as `flags`, a dict.

    The decorated function takes `flags` as its keyword, and any parameters of its own beside it.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        hints = get_type_hints(function, include_extras=True)
        own = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in inspect.signature(function).parameters.values()
            if parameter.name != "flags"
        ]

        def command(**values: Any) -> Any:
            flags = {name: values.pop(name) for name in names}
            given = {name: value for name, value in flags.items() if value not in (None, [], ())}
            return function(**values, flags=given)

        parameters = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag(name)
            )
            for name in names
        ]
        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        command.__signature__ = inspect.Signature([*keyword_only, *parameters])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*keyword_only, *parameters]}
        command.__name__ = function.__name__
        command.__doc__ = function.__doc__
        return command

    return decorate


def _flag(name: str) -> Any:
    field = Recipe.model_fields[name]
    default = field.default
    shown = (
        None
        if default is None
        else ", ".join(default)
        if isinstance(default, tuple)
        else str(default)
    )
    flag = f"--{name.replace('_', '-')}"
    option = typer.Option(flag, help=field.description, show_default=shown or False)
    return Annotated[_flag_type(field.annotation), option]


def _flag_type(annotation: Any) -> Any:
    """The type of the flag: as the field's, but absent (None) where the user did not give it."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
    if get_origin(annotation) is tuple:
        return list[str] | None
    if get_origin(annotation) is Literal or annotation in (str, int, float, bool, Path):
        return annotation | None
    raise TypeError(f"no flag type for {annotation}")
