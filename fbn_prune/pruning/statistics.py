"""Streaming statistics of activations x [tokens, neurons], the input of a layer's output projection.

The accumulators see one batch at a time and hold only sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fbn_prune import distributed
from fbn_prune.networks.gram import add_cross, add_gram, mirror_upper


class GramStatistics:
    """Accumulates the number of tokens, the sum of x and its Gram matrix.

    Products of a batch are in float32, sums over batches in float64, on the activations' device. Several processes,
    which add the batches in another order, therefore arrive at the same statistics.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count: float = 0
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._upper = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add the tokens of x [tokens, neurons], each counted `weights` [tokens] times (once by default)."""
        x = x.float()
        if weights is None:
            self.count += x.shape[0]
            self._sum += x.sum(0, dtype=torch.float64)
        else:
            self.count += float(weights.sum(dtype=torch.float64))
            self._sum += weights.double() @ x.double()
            x = x * weights.float().sqrt()[:, None]
        add_gram(self._upper, x)

    def add_up(self) -> None:
        """Add the sums of all processes."""
        (self.count,) = distributed.total(self.count)
        distributed.add_up(self._sum, self._upper)

    @property
    def finite(self) -> bool:
        """Whether all activations so far were finite: a NaN or Inf shows in the Gram matrix's diagonal."""
        return bool(torch.isfinite(self._upper.diagonal()).all())

    @property
    def gram(self) -> Tensor:
        """H = xᵀx / tokens, float64 [neurons, neurons]."""
        return mirror_upper(self._upper).div_(self.count or 1)

    @property
    def mean(self) -> Tensor:
        """Mean activation, float64 [neurons]."""
        return self._sum / (self.count or 1)


class CrossStatistics:
    """Accumulates the cross product of a target t [tokens, outputs] with x [tokens, neurons], and the target's mean.

    A refit that reproduces the target instead of the layer's own output needs both.
    """

    def __init__(self, outputs: int, width: int, device: torch.device | str = "cpu") -> None:
        self.count: float = 0
        self._target_sum = torch.zeros(outputs, dtype=torch.float64, device=device)
        self._cross = torch.zeros(outputs, width, dtype=torch.float64, device=device)

    def update(self, target: Tensor, x: Tensor, weights: Tensor | None = None) -> None:
        """Add the tokens of target and x, each counted `weights` [tokens] times (once by default)."""
        target, x = target.float(), x.float()
        if weights is None:
            self.count += x.shape[0]
            self._target_sum += target.sum(0, dtype=torch.float64)
        else:
            self.count += float(weights.sum(dtype=torch.float64))
            self._target_sum += weights.double() @ target.double()
            target = target * weights.float()[:, None]
        add_cross(self._cross, target, x)

    def add_up(self) -> None:
        """Add the sums of all processes."""
        (self.count,) = distributed.total(self.count)
        distributed.add_up(self._target_sum, self._cross)

    @property
    def cross(self) -> Tensor:
        """C = tᵀx / tokens, float64 [outputs, neurons]."""
        return self._cross / (self.count or 1)

    @property
    def target_mean(self) -> Tensor:
        """Mean target, float64 [outputs]."""
        return self._target_sum / (self.count or 1)
