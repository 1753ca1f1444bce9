"""Find a checkpoint's folder, on disk or by download from the Hub, and read its `config.json`.

A download fetches the small files first, so that an unsupported model is refused before its weights are fetched.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fbn_prune.data.text_files import hub_id_fault
from fbn_prune.errors import InvalidInput
from fbn_prune.model.headers import INDEX_FILE, SINGLE_FILE, one_line, read_index, read_object
from fbn_prune.model.remedies import without_config

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
"""Patterns of all files that may belong to a tokenizer and its chat template."""

COMPANION_FILES = ("generation_config.json", "LICENSE*", "NOTICE*", "README.md")


def find_folder(
    path_or_hub_id: str | Path,
    accept: Callable[[dict[str, Any]], object],
    trust_remote_code: bool = False,
) -> tuple[Path, str | None]:
    """Return a checkpoint's folder and its Hub id (None for a local folder), downloading the checkpoint if needed.

    Parameters
    ----------
    path_or_hub_id
        A folder, or a Hub id.
    accept
        Called with the `config.json` object before the weights are downloaded; raises to refuse the model.
    trust_remote_code
        Also download the checkpoint's Python files.

    Raises
    ------
    InvalidInput
        There is no such folder, it is empty, or the Hub cannot provide the model.
    """
    folder = local_folder(path_or_hub_id)
    if folder is not None:
        return folder, None
    hub_id = str(path_or_hub_id)
    return _download(hub_id, accept, trust_remote_code), hub_id


def local_folder(path_or_hub_id: str | Path) -> Path | None:
    """Return a checkpoint's folder on disk, or None for a Hub id.

    Raises
    ------
    InvalidInput
        There is no such folder, it is empty, or the name can be no Hub id.
    """
    path = Path(path_or_hub_id).expanduser()
    try:
        if path.is_dir():
            if not any(path.iterdir()):
                raise InvalidInput(
                    f"{path} is empty; give a folder with config.json and safetensors"
                )
            return path
        exists = path.exists()
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from None
    if exists:
        raise InvalidInput(
            f"{path} is a file; give the folder that holds config.json and safetensors"
        )
    text = str(path_or_hub_id)
    if (
        address := re.match(r"https?://(?:www\.)?(?:huggingface|hf)\.co/([^/]+/[^/?#]+)", text)
    ) is not None:
        raise InvalidInput(f"{text} is an address; give the Hub id {address[1]}")
    if isinstance(path_or_hub_id, Path) or not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", text):
        raise InvalidInput(f"there is no folder {path}; give a model folder or a Hub id")
    if (fault := hub_id_fault(text)) is not None:
        raise InvalidInput(f"there is no folder {path}, and no Hub id is like this: {fault}")
    return None


def _download(
    hub_id: str, accept: Callable[[dict[str, Any]], object], trust_remote_code: bool
) -> Path:
    """Fetch the small files, check the config, and only then fetch the weights."""
    small = ["config.json", INDEX_FILE, *TOKENIZER_FILES, *COMPANION_FILES]
    path = _snapshot(hub_id, small + (["*.py"] if trust_remote_code else []))
    accept(read_config(path))
    index = path / INDEX_FILE
    shards = sorted(set(read_index(path).values())) if index.exists() else [SINGLE_FILE]
    return _snapshot(hub_id, shards)


def _snapshot(hub_id: str, patterns: list[str]) -> Path:
    import huggingface_hub  # slow to import, and a local folder does without
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise InvalidInput(
            f"{hub_id!r} is not a local folder and cannot be downloaded from the Hub: {one_line(error)}; "
            "check the name, the network and your access"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """Return the object in a checkpoint's `config.json`; raise InvalidInput if it is missing or not an object."""
    if not (path / "config.json").is_file():
        raise InvalidInput(without_config(path))
    return read_object(path / "config.json")
