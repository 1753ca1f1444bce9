"""Keep tensors in a temporary file instead of memory during a run.

The file has no name, so its space is freed when the process ends, even if the process is killed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from fbn_prune.errors import FbnPruneError


@dataclass(frozen=True)
class _Place:
    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class Spilled(Sequence[Tensor]):
    """A list of tensors in an unnamed file. Reading an element returns a copy on the tensor's original device.

    Parameters
    ----------
    folder
        The folder of the file; its disk must have room for all tensors.

    Raises
    ------
    FbnPruneError
        The disk is full, or the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: list[_Place] = []
        self._end = 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the list
        except OSError as error:
            raise self._failed(error) from error

    def append(self, tensor: Tensor) -> None:
        place = _Place(self._end, tensor.shape, tensor.dtype, tensor.device)
        self._write(place, tensor)
        self._places.append(place)
        self._end += place.nbytes

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = self._places[index]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        if not place.nbytes:
            return tensor.to(place.device)
        self._file.seek(place.start)
        view = memoryview(_bytes(tensor)).cast("B")
        while len(view):  # one read call returns 2 GiB at most
            got = self._file.readinto(view)
            if not got:
                raise FbnPruneError(f"{self._folder}: a temporary file there has been truncated")
            view = view[got:]
        return tensor.to(place.device)

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        """Replace a tensor by one of the same shape and dtype."""
        place = self._places[index]
        if tensor.shape != place.shape or tensor.dtype != place.dtype:
            raise ValueError(
                f"{tensor.dtype} {list(tensor.shape)} in place of {place.dtype} {list(place.shape)}"
            )
        self._write(place, tensor)

    def _write(self, place: _Place, tensor: Tensor) -> None:
        try:
            self._file.seek(place.start)
            self._file.write(_bytes(tensor.detach().cpu().contiguous()))
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> FbnPruneError:
        reason = error.strerror or str(error)
        return FbnPruneError(f"cannot write temporary data to {self._folder}: {reason}")


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view
