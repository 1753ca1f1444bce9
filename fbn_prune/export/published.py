"""What an output says of the files that it was made from: their names, but not their folders.

An output is made to be passed on, and the path of a file tells of a person and a machine. `recipe.yaml` keeps the paths
on disk, because it must run again; the copy that is uploaded has names only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PATH_KEYS = ("model", "calibration", "task", "task_test", "networks_from")
"""Keys of a recipe that may name local files."""

_PREFIXES = ("hf:", "builtin:", "lm_eval:")


def public_name(source: str) -> str:
    """Return the name of a file or folder without the folders above it; a Hub id or a built-in source stays whole."""
    prefix = next((start for start in _PREFIXES if source.startswith(start)), "")
    rest = source.removeprefix(prefix)
    local = rest.startswith((".", "~")) or Path(rest).is_absolute() or rest.count("/") > 1
    if prefix == "hf:" or not local:
        return source
    return prefix + (Path(rest).name or rest)


def without_paths(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's keys and values with names instead of paths."""
    return {
        key: _public(value) if key in _PATH_KEYS else value
        for key, value in recipe.items()
        if key not in ("output", "work_dir")
    }


def _public(value: Any) -> Any:
    if isinstance(value, list):
        return [_public(one) for one in value]
    return public_name(value) if isinstance(value, str) else value
