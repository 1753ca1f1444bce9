"""The folder of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError

from fbn_prune.errors import InvalidInput
from fbn_prune.model.shards import INDEX_FILE, SINGLE_FILE, one_line, read_index, read_object

VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "*.model",
    "*.model.v*",
    "*.tiktoken",
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
"""Patterns of everything a tokenizer and its chat template may be made of."""

COMPANION_FILES = ("generation_config.json", "LICENSE*", "NOTICE*", "README.md")


def find_folder(
    path_or_hub_id: str | Path,
    accept: Callable[[dict[str, Any]], object],
    trust_remote_code: bool = False,
) -> tuple[Path, str | None]:
    """The folder of a checkpoint, and the Hub id that it was downloaded by.

    Parameters
    ----------
    accept : raises for the `config.json` object of a model whose weights are not to be downloaded.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        if not any(path.iterdir()):
            raise InvalidInput(f"{path} is empty; give a folder with config.json and safetensors")
        return path, None
    if path.exists():
        raise InvalidInput(f"{path} is a file; give the folder that holds it and config.json")
    text = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", text):
        raise InvalidInput(f"there is no folder {path}; give a model folder or a Hub id")
    return _download(text, accept, trust_remote_code), text


def _download(
    hub_id: str, accept: Callable[[dict[str, Any]], object], trust_remote_code: bool
) -> Path:
    """Fetch the small files, refuse what they already rule out, and only then fetch the weights."""
    small = ["config.json", INDEX_FILE, *TOKENIZER_FILES, *COMPANION_FILES]
    path = _snapshot(hub_id, small + (["*.py"] if trust_remote_code else []))
    accept(read_config(path))
    index = path / INDEX_FILE
    shards = sorted(set(read_index(path).values())) if index.exists() else [SINGLE_FILE]
    return _snapshot(hub_id, shards)


def _snapshot(hub_id: str, patterns: list[str]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise InvalidInput(
            f"{hub_id!r} is no folder here, and cannot be had from the Hub: {one_line(error)}"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """The object in a checkpoint's `config.json`."""
    if not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").is_file()
        hint = "; this is an adapter: merge it into its base model first" if adapter else ""
        raise InvalidInput(f"{path} has no config.json{hint}")
    return read_object(path / "config.json")
