"""Read the header of a GGUF file: its metadata, and the place of each tensor.

Every length is checked against the size of the file. The reader of the `gguf` package does not check them, so a damaged
file can make it loop without end; it also takes seconds for a large vocabulary. The format is described in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fbn_prune.errors import InvalidInput

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_UINT32, _STRING, _ARRAY = 4, 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"} | {
    12: "d"
}
"""GGUF's number types as characters of the `struct` module."""

_MOST_AXES = 4
_LONGEST_NAME = 2**16


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor is in its file, and how it is stored.

    Attributes
    ----------
    part
        The file.
    shape
        The shape in PyTorch's order; GGUF writes it the other way round.
    kind
        The number of its quantization type.
    start, nbytes
        Its place in the file.
    """

    name: str
    part: Path
    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file.

    Attributes
    ----------
    metadata
        Its settings; of an array of strings, such as the vocabulary, only the length.
    tensors
        Its tensors by name.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_header(path: Path, sizes: Mapping[int, tuple[int, int]]) -> GgufHeader:
    """Return the header of a GGUF file; no tensor is read.

    Parameters
    ----------
    path
        The file.
    sizes
        For each quantization type that can be read, the number of values in a block and the block's bytes.

    Raises
    ------
    InvalidInput
        The file cannot be opened, is incomplete or damaged, or holds a type that cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _header(_Bytes(path, file), sizes)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error


class _Bytes:
    """The bytes of a file in turn; a length that points beyond its end is refused."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.size = path.stat().st_size
        self.place = 0

    def take(self, count: int) -> bytes:
        self.require(count)
        self.place += count
        data = self._file.read(count)
        if len(data) != count:
            raise self.damaged("it ends within its header")
        return data

    def skip(self, count: int) -> None:
        self.require(count)
        self.place += count
        self._file.seek(self.place)

    def require(self, count: int) -> None:
        if count > self.size - self.place:
            raise self.damaged("it ends within its header")

    def number(self, kind: int) -> Any:
        (value,) = struct.unpack(f"<{_NUMBERS[kind]}", self.take(_width(kind)))
        return value

    def count(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def text(self, longest: int | None = None) -> str:
        length = self.count()
        if longest is not None and length > longest:
            raise self.damaged(f"a name in its header has {length:,} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged("its header has a string that is not UTF-8") from None

    def damaged(self, reason: str) -> InvalidInput:
        return InvalidInput(
            f"{self.path} is not a complete GGUF file ({reason}); download it again"
        )


def _header(data: _Bytes, sizes: Mapping[int, tuple[int, int]]) -> GgufHeader:
    if data.size < len(MAGIC) or data.take(len(MAGIC)) != MAGIC:
        raise InvalidInput(f"{data.path} is not a GGUF file: it does not begin with GGUF")
    version = data.number(_UINT32)
    if version & 0xFFFF == 0:
        raise InvalidInput(f"{data.path} is written for big-endian machines, which is not read")
    if version not in _VERSIONS:
        raise InvalidInput(f"{data.path} has GGUF version {version}; versions 2 and 3 are read")
    tensor_count, key_count = data.count(), data.count()
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = data.text(_LONGEST_NAME)
        if key in metadata:
            raise data.damaged(f"its header has {reprlib.repr(key)} twice")
        metadata[key] = _value(data, key)
    found = [_tensor(data) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise data.damaged(f"its alignment is {reprlib.repr(alignment)}: not a power of two")
    start = -(-data.place // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in found:
        if name in tensors:
            raise data.damaged(f"it has the tensor {reprlib.repr(name)} twice")
        nbytes = _nbytes(data.path, name, shape, kind, sizes)
        if start + offset + nbytes > data.size:
            raise data.damaged(f"it ends before the end of its tensor {name}")
        tensors[name] = GgufTensor(name, data.path, shape, kind, start + offset, nbytes)
    return GgufHeader(metadata, tensors)


def _value(data: _Bytes, key: str) -> Any:
    kind = data.number(_UINT32)
    if kind in _NUMBERS:
        return _shortest(data.number(kind), kind)
    if kind == _STRING:
        return data.text()
    if kind != _ARRAY:
        raise data.damaged(f"{reprlib.repr(key)} has the unknown type {kind}")
    inner, count = data.number(_UINT32), data.count()
    if inner == _STRING:
        for _ in range(count):
            data.skip(data.count())
        return count
    if inner not in _NUMBERS:
        raise data.damaged(f"{reprlib.repr(key)} is an array of the unknown type {inner}")
    data.require(count * _width(inner))
    values = struct.unpack(f"<{count}{_NUMBERS[inner]}", data.take(count * _width(inner)))
    return [_shortest(value, inner) for value in values]


def _shortest(value: Any, kind: int) -> Any:
    """Return a float32 as the shortest decimal number that rounds to it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if _NUMBERS[kind] == "f" else value


def _width(kind: int) -> int:
    return struct.calcsize(f"<{_NUMBERS[kind]}")


def _tensor(data: _Bytes) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of the next tensor."""
    name, axes = data.text(_LONGEST_NAME), data.number(_UINT32)
    if axes > _MOST_AXES:
        raise data.damaged(f"its tensor {reprlib.repr(name)} has {axes} axes")
    shape = tuple(data.count() for _ in range(axes))[::-1]
    return name, shape, data.number(_UINT32), data.count()


def _nbytes(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    kind: int,
    sizes: Mapping[int, tuple[int, int]],
) -> int:
    if kind not in sizes:
        raise InvalidInput(
            f"{path}: {name} has the quantization type {kind}, which the installed gguf package cannot dequantize"
        )
    values, nbytes = sizes[kind]
    if not prod(shape) or not shape or shape[-1] % values:
        raise InvalidInput(
            f"{path}: {name} has shape {list(shape)}: not blocks of {values} values along the last axis"
        )
    return prod(shape) // values * nbytes
