"""Read untrusted text and YAML files: of limited size and in UTF-8, or refused with a one-line error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from fbn_prune.errors import InvalidInput


def is_text(text: str) -> bool:
    """Whether a string has no NUL and no lone surrogate, so that it can be a file's content or name."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in text


GENERATED = "generated"
"""Name of the text that a run lets its model write, where a source of text is asked for."""


def require_source(source: str) -> None:
    """Check that a calibration source exists; what it holds is checked when it is read.

    Raises
    ------
    InvalidInput
        There is no such file or folder, or it may not be read.
    """
    if source == "builtin":
        return
    if source.startswith("hf:"):
        name = source.removeprefix("hf:").partition(":")[0]
        if not Path(name).exists() and (fault := hub_id_fault(name)) is not None:
            raise InvalidInput(f"calibration source {source!r}: no data set has this name: {fault}")
        return
    head = source.rpartition(":")[0]  # FILE:FIELD
    path = next((path for path in (Path(source), Path(head or source)) if path.exists()), None)
    if path is None:
        raise InvalidInput(
            f"calibration source {source!r} does not exist; give a file, a folder, hf:DATASET or builtin"
        )
    if not os.access(path, os.R_OK):
        raise InvalidInput(f"cannot read calibration source {source!r}: Permission denied")


def hub_id_fault(name: str) -> str | None:
    """Return why a name can be no repository of the Hugging Face Hub; None if it can."""
    from huggingface_hub.errors import HFValidationError  # not needed for what is on this machine
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return " ".join(str(error).split()).rstrip(".")
    return None


def require_readable(path: Path) -> None:
    """Check that a file can be opened: other libraries call a missing permission damage, or a missing file.

    Raises
    ------
    InvalidInput
        It cannot; the message has the operating system's reason.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from None


def read_text(path: Path, name: str, *, most_bytes: int) -> str:
    """Return the text of a file.

    Parameters
    ----------
    path
        The file.
    name
        Its name in error messages.
    most_bytes
        Larger files are refused.

    Raises
    ------
    InvalidInput
        The file is missing, too large, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidInput(
            f"cannot read {name}: {reason}; check its name and permissions"
        ) from None
    if len(data) > most_bytes:
        raise InvalidInput(
            f"{name} is larger than {most_bytes:,} bytes, the most that is read: give a smaller one"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidInput(
            f"{name} is not UTF-8 text (line {line}: {error.reason}): save it as UTF-8"
        ) from None


def read_yaml(text: str, name: str) -> Any:
    """Return the content of a YAML text; `name` is its name in error messages.

    Raises
    ------
    InvalidInput
        The text is not YAML, or uses aliases, which could expand to any size.
    """
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise InvalidInput(f"{name} uses YAML aliases (*name): write out what they refer to")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        line = " ".join(str(error).split())
        raise InvalidInput(f"{name} is not YAML, correct it: {line}") from None
