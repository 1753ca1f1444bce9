"""The set of neurons of an MLP that a call runs through.

A set lists the kept rows of `up`, `gate` and the transposed `down`. The layout of these rows in memory decides how the
set is run: a prefix (a view, without gathering), aligned blocks of 64 rows, or any sorted rows.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK = 64
"""Neurons in an aligned block; every index list is padded to a multiple of it."""

_MAX_WIDTH = 2**31 - 1


class Kind(enum.Enum):
    """The layout of a set's rows in memory."""

    PREFIX = "prefix"
    BLOCK64 = "block64"
    ROWS = "rows"


@dataclass(frozen=True, eq=False)
class NeuronSet:
    """The neurons of one MLP that are kept.

    Attributes
    ----------
    width
        Neurons in the whole MLP.
    count
        Neurons kept, from 1 to `width`.
    kind
        The layout of the kept rows in memory.
    indices
        int32, [`count` rounded up to a multiple of 64]: the kept neurons, ascending; the padding
        repeats the last one, so that every entry is a valid row.
    listed
        `indices` without the padding, [`count`]. `torch.compile` treats the length of a tensor as variable and a number
        as constant, so code compiled with this length works for all sets.
    """

    width: int
    count: int
    kind: Kind
    indices: Tensor
    listed: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "listed", self.indices[: self.count])

    @classmethod
    def from_indices(cls, indices: Tensor | Sequence[int], width: int) -> NeuronSet:
        """Check a list of neurons and determine its layout in memory.

        Parameters
        ----------
        indices
            The kept neurons, strictly ascending integers in [0, `width`). A tensor keeps its device.
        width
            Neurons in the whole MLP.

        Raises
        ------
        ValueError
            The list is empty, unsorted, has a duplicate or an entry outside the MLP.
        TypeError
            The entries are not integers.
        """
        given = torch.as_tensor(indices)
        if given.dtype == torch.bool or given.is_floating_point() or given.is_complex():
            if given.numel():
                raise TypeError(f"neuron indices must be integers, got {given.dtype}")
            given = given.to(torch.int64)
        if given.dim() != 1:
            raise ValueError(f"neuron indices must be a flat list, got shape {list(given.shape)}")
        if not 0 < width <= _MAX_WIDTH:
            raise ValueError(f"width must be from 1 to {_MAX_WIDTH}, got {width}")
        host = given.detach().to("cpu", torch.int64)
        _check_ascending(host, width)
        count = host.numel()
        padded = torch.cat([host, host[-1:].expand(-count % BLOCK)]).to(torch.int32)
        return cls(width, count, _kind_of(host), padded.to(given.device))

    @classmethod
    def full(cls, width: int, device: torch.device | str = "cpu") -> NeuronSet:
        """Return the set of all `width` neurons."""
        return cls.from_indices(torch.arange(width, device=device), width)

    def to(self, device: torch.device | str) -> NeuronSet:
        """Return the same set with its index list on `device`."""
        if self.indices.device == torch.device(device):
            return self
        return NeuronSet(self.width, self.count, self.kind, self.indices.to(device))

    def rows(self) -> Tensor:
        """Return the kept neurons without padding, int64 [count]."""
        return self.indices[: self.count].to(torch.int64)

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"NeuronSet({self.count} of {self.width}, {self.kind.value}, {self.indices.device})"


def runs_of(rows: Tensor) -> list[tuple[int, int]]:
    """Return the maximal runs of consecutive rows as (first, one past the last).

    `rows` is an ascending integer list on the CPU.
    """
    rows = rows.to(torch.int64)
    breaks = torch.nonzero(rows[1:] != rows[:-1] + 1).flatten()
    firsts = torch.cat([rows[:1], rows[breaks + 1]])
    lasts = torch.cat([rows[breaks], rows[-1:]])
    return list(zip(firsts.tolist(), (lasts + 1).tolist(), strict=True))


def _check_ascending(host: Tensor, width: int) -> None:
    if host.numel() == 0:
        raise ValueError("a set needs at least one neuron, got an empty list")
    outside = (host < 0) | (host >= width)
    if bool(outside.any()):
        position = int(outside.to(torch.int8).argmax())
        raise ValueError(
            f"neuron {int(host[position])} at position {position} is outside [0, {width})"
        )
    steps = host[1:] - host[:-1]
    if bool((steps <= 0).any()):
        position = int((steps <= 0).to(torch.int8).argmax()) + 1
        value = int(host[position])
        if int(steps[position - 1]) == 0:
            raise ValueError(f"neuron {value} is listed twice (position {position})")
        raise ValueError(
            f"neurons must be sorted: {value} at position {position} follows "
            f"{int(host[position - 1])}"
        )


def _kind_of(host: Tensor) -> Kind:
    count = host.numel()
    if int(host[-1]) == count - 1:
        return Kind.PREFIX
    if count % BLOCK == 0:
        blocks = host.view(-1, BLOCK)
        starts = blocks[:, 0]
        aligned = bool((starts % BLOCK == 0).all())
        if aligned and bool((blocks[:, -1] == starts + BLOCK - 1).all()):
            return Kind.BLOCK64
    return Kind.ROWS
