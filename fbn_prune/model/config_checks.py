"""Find config values that transformers accepts but the model cannot use, so that the user can be warned."""

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
"""First words of transformers' warnings about wrong values; its other warnings are advice for authors of configs."""

MOST = 300
"""Characters of a warning that are shown."""


class ConfigWarning(UserWarning):
    """A config has a value that the model cannot use."""


def oddities(path: Path, config: Mapping[str, Any], vocabulary: int) -> str | None:
    """Return one line on wrong token ids and rotary settings in a checkpoint's configs; None if there are none.

    Parameters
    ----------
    path
        The checkpoint's folder; the line does not repeat it.
    config
        The object in its `config.json`.
    vocabulary
        Number of the model's embeddings.
    """
    lines = []
    for name, settings in (("config.json", config), ("generation_config.json", _generation(path))):
        if wrong := list(_no_tokens(settings, vocabulary)):
            lines.append(
                f"{name} gives {' and '.join(wrong)}, which the vocabulary of {vocabulary} tokens does not have; "
                "correct that there"
            )
    lines += [f"config.json: {fault}" for fault in _faults_of_rope(config)]
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
    with _captured("transformers.modeling_rope_utils") as warnings:
        as_config(config)
    faults = dict.fromkeys(line for line in warnings if line.startswith(_ROPE_FAULTS))
    return [_one_line(line) for line in faults]


def _one_line(text: str) -> str:
    """Shorten a warning and replace unprintable characters: it may quote arbitrary values of an untrusted file."""
    line = " ".join(text.split())
    shown = "".join(char if char.isprintable() else "?" for char in line[:MOST])
    return shown if len(line) <= MOST else f"{shown} ..."


@contextmanager
def _captured(name: str) -> Iterator[list[str]]:
    """Collect the warnings of a logger inside the context instead of emitting them."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, collector = logging.getLogger(name), Collector()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(collector)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)
        logger.propagate = propagate
