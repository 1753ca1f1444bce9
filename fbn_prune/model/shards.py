"""Read the headers of a checkpoint's safetensors: a single file, or an index and its shards.

The safetensors library checks each header against its file; this module checks the index against the headers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fbn_prune.data.text_files import read_text
from fbn_prune.errors import InvalidInput

MOST_JSON_BYTES = 100 * 2**20
"""Largest JSON file that is read. It is safetensors' limit for a header, and the index of a million tensors fits."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' dtype names."""

_AGAIN = "download the index and its shards again, from one revision"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def packed(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Return tensors as the bytes of a safetensors file, for `safetensors.torch.load` to read."""
    return save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, metadata)


@dataclass(frozen=True)
class TensorInfo:
    """File, shape and dtype of a tensor, from its shard's header; its name there, where it goes by another."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: str | None = None

    @property
    def parameters(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.parameters * self.dtype.itemsize


def read_headers(path: Path) -> dict[str, TensorInfo]:
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
    tensors: dict[str, TensorInfo] = {}
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
    if gguf := sorted(file.name for file in path.glob("*.gguf")):
        return f"{path} has its weights only as GGUF ({gguf[0]}); give a folder with safetensors"
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


def _read_header(path: Path, file: str) -> dict[str, TensorInfo]:
    """Tensors of one file; safetensors limits the header to 100 MB and checks it against the file size."""
    if not (path / file).is_file():
        raise InvalidInput(
            f"{path / INDEX_FILE} names {file}, which is not in the folder: {_AGAIN}"
        )
    tensors: dict[str, TensorInfo] = {}
    try:
        with safe_open(path / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - a safe_open is not iterable
                view = shard.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise InvalidInput(
                        f"{path / file}: {name} has unknown dtype {view.get_dtype()}; "
                        "give a model stored in float32, float16 or bfloat16"
                    )
                tensors[name] = TensorInfo(file, tuple(view.get_shape()), DTYPES[view.get_dtype()])
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
