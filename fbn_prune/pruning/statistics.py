"""Streaming statistics of activations x [tokens, neurons], the input of a layer's output projection.

Accumulators see one batch at a time and keep sums only; each has `state_dict`, so a pass can be split and joined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fbn_prune import distributed
from fbn_prune.networks.gram import add_cross, add_gram, mirror_upper


class GramStatistics:
    """Count, sum and Gram of x, and where wanted the cross product with a target of the same shape.

    Products of a batch in float32, their sum in float64, on the activations' device: so several processes, which add
    the same batches up in another order, come to the same statistics.
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
        """Join what all processes of the job have seen."""
        (self.count,) = distributed.total(self.count)
        distributed.add_up(self._sum, self._upper)

    @property
    def finite(self) -> bool:
        """False once a NaN or Inf was among the activations: it reaches the diagonal of the Gram."""
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
    """Cross product of a target t with x, both [tokens, neurons], and the target's mean: what a refit to the output
    of another signal needs."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count: float = 0
        self._target_sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._cross = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, target: Tensor, x: Tensor, weights: Tensor | None = None) -> None:
        """Add the tokens of target and x, both [tokens, neurons], each counted `weights` [tokens] times."""
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
        """Join what all processes of the job have seen."""
        (self.count,) = distributed.total(self.count)
        distributed.add_up(self._target_sum, self._cross)

    @property
    def cross(self) -> Tensor:
        """C = tᵀx / tokens, float64 [neurons, neurons]."""
        return self._cross / (self.count or 1)

    @property
    def target_mean(self) -> Tensor:
        """Mean target, float64 [neurons]."""
        return self._target_sum / (self.count or 1)
