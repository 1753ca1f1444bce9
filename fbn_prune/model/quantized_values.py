"""Compute floating-point values from quantized weights: numbers, scales and tables, one slice at a time.

:mod:`fbn_prune.model.quantized_formats` finds the tensors of each weight from configs and names; this module does the
arithmetic. Sources of the formats: DeepSeek-V3 (arXiv 2412.19437) for blocks of float8, the compressed-tensors library
for zero points and packing, LLM.int8() (arXiv 2208.07339) and QLoRA (arXiv 2305.14314) for bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fbn_prune.errors import FbnPruneError, InvalidInput

Read = Callable[[str], Tensor]
"""Returns a stored tensor by name."""

SLICE_ELEMENTS = 2**20
"""Values computed at a time; they need a few temporary arrays of that many four-byte numbers."""

_WORD = 32


@dataclass(frozen=True)
class Scaled:
    """A matrix (stored - zero point) * scale * factor with one scale for each block.

    Attributes
    ----------
    weight, scale, zero
        Names of the stored tensors; `zero` is None where there are no zero points.
    shape
        Rows and columns of the matrix.
    block
        Rows and columns that share a scale; blocks at the edge may be smaller.
    bits
        Bits of a stored number where an int32 packs several (lowest first, offset by half their range).
    zero_packed
        Whether the zero points are packed as well, along the rows.
    groups
        Name of the tensor [columns] with each column's block, where blocks are not consecutive columns.
    beside
        Names of other tensors of the weight, which hold none of its values.
    """

    weight: str
    shape: tuple[int, int]
    scale: str
    block: tuple[int, int]
    zero: str | None = None
    bits: int | None = None
    zero_packed: bool = False
    groups: str | None = None
    factor: float = 1.0
    beside: tuple[str, ...] = ()

    @property
    def parts(self) -> set[str]:
        """Names of all tensors of the weight."""
        names = (self.weight, self.scale, self.zero, self.groups)
        return {*self.beside, *(name for name in names if name is not None)}

    @property
    def grid(self) -> tuple[int, int]:
        """Number of blocks along the rows and along the columns."""
        return (-(-self.shape[0] // self.block[0]), -(-self.shape[1] // self.block[1]))

    def slices(self, read: Read) -> Iterator[Tensor]:
        """Yield the values in row-major order, float32, flat."""
        rows, columns = self.shape
        stored, scale = read(self.weight), read(self.scale).float().reshape(self.grid)
        zero = None if self.zero is None else self._zero(read(self.zero))
        across = self._blocks_of_columns(read)
        at_once = max(1, SLICE_ELEMENTS // max(columns, 1))
        for start in range(0, rows, at_once):
            part = stored[start : start + at_once]
            values = (part if self.bits is None else unpack(part, self.bits, columns)).float()
            down = torch.arange(start, start + len(part)) // self.block[0]
            if zero is not None:
                values = values - zero[down][:, across]
            values = values * scale[down][:, across]
            yield (values if self.factor == 1 else values * self.factor).flatten()

    def _zero(self, stored: Tensor) -> Tensor:
        if self.zero_packed:
            assert self.bits is not None
            stored = unpack(stored.T, self.bits, self.grid[0]).T
        return stored.float().reshape(self.grid)

    def _blocks_of_columns(self, read: Read) -> Tensor:
        runs = torch.arange(self.shape[1]) // self.block[1]
        if self.groups is None:
            return runs
        groups = read(self.groups).long()
        if bool((groups == -1).any()):  # compressed-tensors' value for an order that was never set
            return runs
        if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < self.grid[1]:
            raise InvalidInput(f"{self.groups} has groups outside 0 to {self.grid[1] - 1}")
        return groups


@dataclass(frozen=True)
class Coded:
    """A weight of four-bit codes: each value is a table entry times the peak of its run of elements.

    Attributes
    ----------
    weight
        Name of the codes, two in a byte, the first in the upper half; any dtype, read as bytes.
    shape
        Shape of the weight.
    table
        Name of the table of 16 values.
    peaks
        Name of the largest absolute value of each run; these are codes as well where `nested` is set.
    run
        Number of consecutive elements that share a peak, even.
    nested
        How the peaks are coded; None if they are stored as floating-point numbers.
    beside
        As in :class:`Scaled`.
    """

    weight: str
    shape: tuple[int, ...]
    table: str
    peaks: str
    run: int
    nested: Nested | None = None
    beside: tuple[str, ...] = ()

    @property
    def parts(self) -> set[str]:
        """Names of all tensors of the weight."""
        inner = () if self.nested is None else (self.nested.table, self.nested.peaks)
        return {self.weight, self.table, self.peaks, *inner, *self.beside}

    def slices(self, read: Read) -> Iterator[Tensor]:
        """Yield the values in row-major order, float32, flat."""
        count = torch.Size(self.shape).numel()
        packed = read(self.weight).contiguous().flatten().view(torch.uint8)
        table, peaks = read(self.table).float(), read(self.peaks)
        peaks = peaks.float() if self.nested is None else self.nested.values(peaks, read)
        runs = max(1, SLICE_ELEMENTS // self.run)
        for first in range(0, len(peaks), runs):
            start = first * self.run
            stop = min(start + runs * self.run, count)
            part = packed[start // 2 : -(-stop // 2)]
            codes = torch.stack((part >> 4, part & 0xF), dim=1).flatten()[: stop - start]
            peak = peaks[first : first + runs].repeat_interleave(self.run)[: stop - start]
            yield table[codes.int()] * peak


@dataclass(frozen=True)
class Nested:
    """Peaks stored as eight-bit codes: an entry of a table of 256, times the peak of its run, plus an offset."""

    table: str
    peaks: str
    run: int
    offset: float

    def values(self, codes: Tensor, read: Read) -> Tensor:
        peaks = read(self.peaks).float().repeat_interleave(self.run)[: len(codes)]
        return read(self.table).float()[codes.int()] * peaks + self.offset


Stored = Scaled | Coded


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Unpack signed numbers of 1, 2, 4 or 8 bits from int32 words, lowest bits first.

    [rows, words] -> [rows, columns] int32. The stored numbers are offset by half their range.
    """
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    numbers = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return numbers.flatten(1)[:, :columns] - 2 ** (bits - 1)


def plain(name: str, stored: Stored, read: Read, dtype: torch.dtype) -> Tensor:
    """Return the whole weight in `dtype`, rounded once from float32.

    Parameters
    ----------
    name
        The weight's name, for the error.
    stored
        How the weight is stored.
    read
        Returns a stored tensor by name.
    dtype
        Dtype of the result.

    Raises
    ------
    FbnPruneError
        A value is not finite, or too large for `dtype`.
    """
    result = torch.empty(stored.shape, dtype=dtype)
    flat, done = result.view(-1), 0
    for values in stored.slices(read):
        flat[done : done + len(values)] = rounded(name, values, dtype)
        done += len(values)
    assert done == len(flat)
    return result


def rounded(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert values to `dtype`; raise the same error as :func:`plain`."""
    result = values.to(dtype)
    if not bool(torch.isfinite(result).all()):
        if bool(torch.isfinite(values).all()):
            raise FbnPruneError(f"{name} has values too large for {dtype}: give another --dtype")
        raise FbnPruneError(f"{name} has values that are not finite: the checkpoint is damaged")
    return result
