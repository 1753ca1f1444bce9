"""Read the headers of a checkpoint's safetensors (a single file, or an index and its shards) without torch.

The safetensors library checks each header against its file; this module checks the index against the headers.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open

from fbn_prune.data.text_files import read_text, require_readable
from fbn_prune.errors import InvalidInput

MOST_JSON_BYTES = 100 * 2**20
"""Largest JSON file that is read. It is safetensors' limit for a header, and the index of a million tensors fits."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_AGAIN = "download the index and its shards again, from one revision"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_BITS = re.compile(r"[A-Z]+(\d+)")


@dataclass(frozen=True)
class StoredTensor:
    """File, shape and safetensors' dtype name of a tensor, from its shard's header."""

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        bits = _BITS.match(self.dtype)
        return prod(self.shape) * (8 if bits is None else int(bits[1])) // 8


def read_stored(path: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a checkpoint by name. As in transformers, a single file takes precedence over an index.

    Raises
    ------
    InvalidInput
        There are no safetensors, a file is damaged, or the index contradicts the headers.
    """
    if (path / SINGLE_FILE).is_file():
        return _read_header(path, SINGLE_FILE)
    if not (path / INDEX_FILE).is_file():
        raise InvalidInput(_no_weights(path))
    weight_map = read_index(path)
    shards = {shard: _read_header(path, shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise InvalidInput(
                f"{path / INDEX_FILE} says that {name} is in {shard}, but it is not: {_AGAIN}"
            )
    tensors: dict[str, StoredTensor] = {}
    for shard, header in shards.items():
        for name, info in header.items():
            if weight_map.get(name, shard) != shard or name in tensors:
                raise InvalidInput(
                    f"{path / shard} holds {name}, which the index places elsewhere: {_AGAIN}"
                )
            tensors[name] = info
    return tensors


def _no_weights(path: Path) -> str:
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        return (
            f"{path} holds only pickled weights ({pickles[0]}), which are never read: "
            "convert them to safetensors, for instance with transformers' save_pretrained"
        )
    neither = f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}"
    loose = sorted(file.name for file in path.glob("*.safetensors"))
    if "adapter_model.safetensors" in loose:
        return f"{neither}; this is an adapter: merge it into its base model first"
    if loose and loose[0].startswith("consolidated"):
        return f"{neither}, only Mistral's own form ({loose[0]}): download the files of these names"
    if len(loose) == 1:
        return f"{neither}; {loose[0]} exists, but no index names it: rename it to {SINGLE_FILE}"
    if loose:
        return f"{neither}; {loose[0]} exists, but no index names it: download {INDEX_FILE} too"
    return f"{neither}: download the weights, or give the folder that holds them"


def _read_header(path: Path, file: str) -> dict[str, StoredTensor]:
    """Tensors of one file; safetensors limits the header to 100 MB and checks it against the file size."""
    if not (path / file).is_file():
        raise InvalidInput(
            f"{path / INDEX_FILE} names {file}, which is not in the folder: {_AGAIN}"
        )
    require_readable(path / file)
    tensors: dict[str, StoredTensor] = {}
    try:
        with safe_open(path / file, framework="np") as shard:
            for name in shard.keys():  # noqa: SIM118 - a safe_open is not iterable
                view = shard.get_slice(name)
                tensors[name] = StoredTensor(file, tuple(view.get_shape()), view.get_dtype())
    except (SafetensorError, OSError) as error:
        if _is_pointer(path / file):
            raise InvalidInput(
                f"{path / file} is not a complete safetensors file, only a pointer of Git LFS: run `git lfs pull`"
            ) from None
        raise InvalidInput(
            f"{path / file} is not a complete safetensors file ({one_line(error)}); download it again"
        ) from error
    return tensors


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return False


def read_index(path: Path) -> dict[str, str]:
    """Return the shard of each tensor from a checkpoint's index.

    Raises
    ------
    InvalidInput
        The index is malformed, or names a file outside the checkpoint's folder.
    """
    weight_map = read_object(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidInput(
            f"{path / INDEX_FILE} has no weight_map from tensor names to shards: {_AGAIN}"
        )
    return {name: shard_name(shard) for name, shard in weight_map.items()}


def shard_name(name: object) -> str:
    """Return a shard's name from an index; raise InvalidInput if it points outside the checkpoint's folder.

    Symbolic links are allowed, because the Hub's cache consists of them.
    """
    if (
        not isinstance(name, str)
        or not name.endswith(".safetensors")
        or PureWindowsPath(name).anchor
        or ".." in PureWindowsPath(name).parts
    ):
        raise InvalidInput(
            f"{INDEX_FILE} names the shard {name!r}: shards must be .safetensors files in the checkpoint's folder"
        )
    return name


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise InvalidInput if there is none."""
    if path.exists():
        require_readable(path)
    try:
        content = json.loads(read_text(path, "it", most_bytes=MOST_JSON_BYTES))
    except (InvalidInput, ValueError, RecursionError) as error:
        raise InvalidInput(
            f"{path} is not readable JSON, correct or replace it: {one_line(error)}"
        ) from error
    if not isinstance(content, dict):
        raise InvalidInput(
            f"{path} must hold a JSON object, found {type(content).__name__}; replace it"
        )
    return content


def one_line(error: BaseException) -> str:
    """Return another library's error message on one line, shortened to 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
