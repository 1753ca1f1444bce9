"""Sums over the inputs of one output projection, from which a layer's evidence is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch
from fbn_prune.errors import InvalidInput
from fbn_prune.pruning.shortfall import SetAside, Shortfall
from fbn_prune.pruning.statistics import CrossStatistics, GramStatistics

ASIDE_TOKENS = 4096
"""Tokens of sequential mode to choose the shares of a :class:`Shortfall` on."""

LARGEST_PART = 8
"""At most this part of the tokens, one in eight, is set aside."""


class OutputSums:
    """Sums over the input of one output projection with `weight` [d, N]."""

    def __init__(self, weight: Tensor) -> None:
        self.own = GramStatistics(weight.shape[1], weight.device)

    def update(self, x: Tensor, weights: Tensor | None) -> None:
        """Add the tokens of x [tokens, N], each counted `weights` [tokens] times (once by default)."""
        self.own.update(x, weights)

    def add_up(self, name: str, layer: int) -> None:
        """Add the sums of all processes.

        Raises
        ------
        InvalidInput
            They contain NaN or Inf; the message has the name of the inputs and their layer.
        """
        self.own.add_up()
        if not self.own.finite:
            raise InvalidInput(
                f"NaN or Inf among the {name} activations of layer {layer}: the checkpoint is damaged, "
                "or the compute type overflows (try --dtype float32)"
            )

    def facts(self) -> dict[str, Any]:
        """Return arguments for :class:`OutputEvidence`."""
        own = self.own
        return {"gram": own.gram, "mean": own.mean, "tokens": own.count, "shortfall": None}


class SumsOfBoth(OutputSums):
    """The same sums in sequential mode, and those for a :class:`Shortfall`."""

    def __init__(self, weight: Tensor, parts: int) -> None:
        super().__init__(weight)
        self._weight = weight
        self._parts = [
            CrossStatistics(weight.shape[0], weight.shape[1], weight.device) for _ in range(parts)
        ]
        self._aside: list[tuple[Tensor, Tensor, Tensor]] = []

    def update_both(
        self,
        x_dense: Tensor,
        x: Tensor,
        lacking: Tensor | None,
        set_aside: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        """Add a batch's tokens; `lacking` [tokens, d] is all that the output lacks, None if that is not known."""
        self.own.update(x, weights)
        own = ((x_dense - x) @ self._weight.to(x).T).float()
        more = torch.zeros_like(own) if lacking is None else lacking - own
        parts = [own, more][: len(self._parts)]
        for sums, part in zip(self._parts, parts, strict=True):
            sums.update(part, x, weights)
        if set_aside is not None:
            rows = set_aside.to(x.device)
            counts = x.new_ones(len(x), dtype=torch.float64) if weights is None else weights
            self._aside.append((x[rows].float(), torch.stack(parts)[:, rows], counts[rows]))

    def add_up(self, name: str, layer: int) -> None:
        super().add_up(name, layer)
        for sums in self._parts:
            sums.add_up()

    def facts(self) -> dict[str, Any]:
        cross = torch.stack([sums.cross for sums in self._parts])
        mean = torch.stack([sums.target_mean for sums in self._parts])
        return super().facts() | {"shortfall": Shortfall(cross, mean, self._joined_aside())}

    def _joined_aside(self) -> SetAside | None:
        outputs, width = self._weight.shape
        empty = self._parts[0].cross.new_zeros(0, dtype=torch.float32)
        found = self._aside or [
            (empty.view(0, width), empty.view(len(self._parts), 0, outputs), empty.double())
        ]
        x, parts, weights = (list(each) for each in zip(*found, strict=True))
        rows = distributed.joined_rows(torch.cat(x))
        lacking = distributed.joined_rows(torch.cat(parts, 1).transpose(0, 1).contiguous())
        counts = distributed.joined_rows(torch.cat(weights))
        return SetAside(rows, lacking.transpose(0, 1), counts) if len(rows) else None


def tokens_set_aside(batches: Sequence[Batch]) -> list[Tensor | None]:
    """Return for each batch which of its valid tokens are set aside, bool [tokens]; None for a batch without any.

    Whole blocks are set aside, about :data:`ASIDE_TOKENS` tokens but at most an eighth of all; of fewer than eight
    blocks, one; of a single block, none.
    """
    blocks = sum(len(batch.input_ids) for batch in batches)
    tokens = sum(batch.tokens for batch in batches)
    if blocks < 2:
        return [None for _ in batches]
    every = min(max(LARGEST_PART, tokens // ASIDE_TOKENS), blocks)
    found: list[Tensor | None] = []
    first = 0
    for batch in batches:
        chosen = torch.arange(first, first + len(batch.input_ids)) % every == every - 1
        first += len(chosen)
        rows = chosen[:, None].expand(batch.valid.shape)[batch.valid]
        found.append(rows if bool(rows.any()) else None)
    return found
