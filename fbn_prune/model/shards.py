"""The tensors of a checkpoint with their dtypes in torch; :mod:`fbn_prune.model.headers` reads the files."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from fbn_prune.errors import InvalidInput
from fbn_prune.model.headers import StoredTensor, read_stored

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


def packed(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Return tensors as the bytes of a safetensors file, for `safetensors.torch.load` to read."""
    return save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, metadata)


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with the permissions of any new file; the library's own are for the user alone."""
    with path.open("wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    save_file(tensors, path, metadata)
    path.chmod(mode)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor, by its shard's header.

    Attributes
    ----------
    file, shape, dtype
        The tensor's.
    stored
        Its name in the file, where it goes by another.
    saved_as
        Its name in a checkpoint that is written, where it goes by another.
    """

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: str | None = None
    saved_as: str | None = None

    @property
    def parameters(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.parameters * self.dtype.itemsize


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """Return all tensors of a checkpoint by name; see :func:`fbn_prune.model.headers.read_stored`.

    Raises
    ------
    InvalidInput
        A tensor has a dtype that is not known, or the files cannot be used.
    """
    return {
        name: TensorInfo(stored.file, stored.shape, _dtype_of(path, name, stored))
        for name, stored in read_stored(path).items()
    }


def _dtype_of(path: Path, name: str, stored: StoredTensor) -> torch.dtype:
    if stored.dtype not in DTYPES:
        raise InvalidInput(
            f"{path / stored.file}: {name} has unknown dtype {stored.dtype}; "
            "give a model stored in float32, float16 or bfloat16"
        )
    return DTYPES[stored.dtype]
