"""What a checkpoint's small files say that transformers loads all the same, and that its user should know of."""

from __future__ import annotations

import json
import logging
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fbn_prune.model.family import as_config

_ROPE_FAULTS = ("`rope_parameters`'s", "Missing required keys", "Unrecognized keys")
"""How transformers begins what it says of a value that is wrong; the rest is advice to authors of configs."""


MOST = 300
"""Characters of what is passed on."""


class ConfigWarning(UserWarning):
    """A config means something that the model cannot do."""


def oddities(path: Path, config: Mapping[str, Any], vocabulary: int) -> str | None:
    """One line on what is odd in a checkpoint's configs, without the folder's name; None if nothing is.

    Parameters
    ----------
    path : the folder.
    config : the object in its `config.json`.
    vocabulary : embeddings of the model.
    """
    lines = []
    for name, settings in (
        ("config.json", config),
        ("generation_config.json", _generation(path)),
    ):
        if wrong := list(_no_tokens(settings, vocabulary)):
            lines.append(
                f"{name} gives {' and '.join(wrong)}, which the vocabulary of {vocabulary} tokens does not have; "
                "correct that there"
            )
    lines += [f"config.json: {said}" for said in _faults_of_rope(config)]
    return "; ".join(lines) or None


def _generation(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _no_tokens(settings: Mapping[str, Any], vocabulary: int) -> Iterator[str]:
    for key, value in settings.items():
        if not re.fullmatch(r"\w{1,40}_token_id", key):
            continue
        for index in value if isinstance(value, list) else [value]:
            if isinstance(index, int) and not 0 <= index < vocabulary:
                yield f"{key} {reprlib.repr(index)}"


def _faults_of_rope(config: Mapping[str, Any]) -> list[str]:
    with _heard("transformers.modeling_rope_utils") as said:
        as_config(config)
    faults = dict.fromkeys(line for line in said if line.startswith(_ROPE_FAULTS))
    return [_one_line(line) for line in faults]


def _one_line(text: str) -> str:
    """Values of a stranger's file may be in it: of any length, and of characters that move a terminal's cursor."""
    line = " ".join(text.split())
    shown = "".join(char if char.isprintable() else "?" for char in line[:MOST])
    return shown if len(line) <= MOST else f"{shown} ..."


@contextmanager
def _heard(name: str) -> Iterator[list[str]]:
    """The warnings that a logger is given meanwhile, which go nowhere else."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, ear = logging.getLogger(name), Ear()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(ear)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(ear)
        logger.setLevel(level)
        logger.propagate = propagate
