"""Text files that others wrote: bounded, UTF-8, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fbn_prune.errors import InvalidInput


def is_text(text: str) -> bool:
    """Whether a string can be written to a file and name one: JSON and YAML can bring NULs and half characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def read_text(path: Path, name: str, *, most_bytes: int) -> str:
    """The text of a file.

    Raises
    ------
    InvalidInput
        The file is missing, larger than that, or not UTF-8; the line calls it `name`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidInput(f"cannot read {name}: {reason}") from None
    if len(data) > most_bytes:
        raise InvalidInput(
            f"{name} is larger than {most_bytes:,} bytes, which is more than is read"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name} is not UTF-8 text: {error.reason}") from None


def read_yaml(text: str, name: str) -> Any:
    """What a YAML text says; `name` is what an error calls it.

    Raises
    ------
    InvalidInput
        It is not YAML, or refers back to its own parts, which can make it as large as it likes.
    """
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise InvalidInput(f"{name} refers back to its own parts (*): write them out")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        line = " ".join(str(error).split())
        raise InvalidInput(f"{name} is not YAML: {line}") from None
