"""Tokens as a router sends them to experts, and the cut of a layer's experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fbn_prune.model.heads import rounded


@dataclass(frozen=True)
class Routed:
    """Tokens as a router sends them to experts.

    Attributes
    ----------
    hidden
        What the experts read, [tokens, hidden].
    index
        int64 [tokens, k]: the experts of each token.
    gates
        [tokens, k]: the factors of their outputs.
    weights
        float64 [tokens]: how much each token counts in statistics; None for 1.
    """

    hidden: Tensor
    index: Tensor
    gates: Tensor
    weights: Tensor | None = None

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the tokens that an expert gets, int64 [n], and their gates in float64, [n]."""
        rows, places = torch.where(self.index == expert)
        return rows, self.gates[rows, places].double()

    def counts(self, rows: Tensor) -> Tensor:
        """Return how much each of some tokens counts, float64 [n]."""
        if self.weights is None:
            return torch.ones(len(rows), dtype=torch.float64, device=self.hidden.device)
        return self.weights[rows]

    @classmethod
    def joined(cls, parts: Sequence[Routed]) -> Routed:
        """Return the tokens of several batches together."""
        weights = [part.weights for part in parts]
        return cls(
            torch.cat([part.hidden for part in parts]),
            torch.cat([part.index for part in parts]),
            torch.cat([part.gates for part in parts]),
            None
            if any(w is None for w in weights)
            else torch.cat([w for w in weights if w is not None]),
        )


@dataclass(frozen=True)
class ExpertsCut:
    """The cut of one layer's experts.

    Attributes
    ----------
    experts
        int64 [K]: the experts to keep, ascending.
    neurons
        For each of them the neurons to keep, int64 [n], ascending; the same number for all.
    down
        Their new output weights, [hidden, n] each.
    bias
        Their new output biases, [hidden] each; None keeps the old ones.
    """

    experts: Tensor
    neurons: tuple[Tensor, ...]
    down: tuple[Tensor, ...]
    bias: tuple[Tensor, ...] | None = None

    @property
    def width(self) -> int:
        """Neurons of each expert that are kept."""
        return len(self.neurons[0])

    def rounded(self, dtype: torch.dtype) -> ExpertsCut:
        """Return the cut with output weights and biases in another dtype, on the CPU and in memory of its own.

        Raises
        ------
        FbnPruneError
            One of them is not finite in it.
        """

        def own(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(rounded(one, dtype).to("cpu", copy=True).contiguous() for one in values)

        return replace(
            self, down=own(self.down), bias=None if self.bias is None else own(self.bias)
        )

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors of the cut by name."""
        found = {
            "experts": self.experts,
            "neurons": torch.stack(self.neurons),
            "down": torch.stack(self.down),
        }
        return found if self.bias is None else {**found, "bias": torch.stack(self.bias)}

    @classmethod
    def of_parts(cls, parts: Mapping[str, Tensor]) -> ExpertsCut:
        """Rebuild a cut from what :meth:`parts` returned."""
        bias = None if "bias" not in parts else tuple(parts["bias"])
        return cls(parts["experts"], tuple(parts["neurons"]), tuple(parts["down"]), bias)
