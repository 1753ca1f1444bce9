"""Where a training keeps what it has finished, for a run that has to start again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Compute = Callable[[], dict[str, Tensor]]


class RecoveryStore(Protocol):
    """Keeps finished parts of a training; of several processes on one job the first keeps, and tells the others."""

    def tensors(self, stage: str, compute: Compute) -> dict[str, Tensor]:
        """A finished part: as kept, or computed and kept. All processes call it."""

    def state(self, stage: str) -> dict[str, Tensor] | None:
        """The last state that a part kept on its way; None where there is none. All processes call it."""

    def keep_state(self, stage: str, number: int, compute: Compute) -> None:
        """Keep a state, higher in number than those before, in their place; without the other processes."""


class KeepsNothing:
    """The store of a training that starts at the beginning."""

    def tensors(self, stage: str, compute: Compute) -> dict[str, Tensor]:
        return compute()

    def state(self, stage: str) -> dict[str, Tensor] | None:
        return None

    def keep_state(self, stage: str, number: int, compute: Compute) -> None:
        return None
