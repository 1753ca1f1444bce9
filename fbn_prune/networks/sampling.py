"""A fixed sample of activations, streamed layer by layer, as ICA reads it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fbn_prune import distributed
from fbn_prune.data.calibration import Batch, TokenBlocks
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.spill import Spilled
from fbn_prune.networks import ica
from fbn_prune.progress import Advance, StageClock

LEAST_BLOCKS = 32
"""Networks are found on tokens of at least this many blocks, where there are: tokens of one context are alike."""

CONTEXT_REACH = 8
"""Tokens shown before and after a network's top token."""


class SampledActivations:
    """Standardised activations Z [tokens, neurons] of one layer after another, for a fixed sample of tokens.

    Iterating yields layer by layer; the first pass also fills `mean` and `std` (lists of [neurons], float32).

    Parameters
    ----------
    tokens
        Size of the sample; evenly spaced over the blocks, which are the first of `blocks` that give enough.
    keep
        Whether activations stay in memory between passes; else those of a streamed model go to disk, and those of
        another are computed again.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        blocks: TokenBlocks,
        tokens: int,
        *,
        batch_tokens: int,
        keep: bool,
        clock: StageClock,
    ) -> None:
        self._adapter, self._clock = adapter, clock
        self._batches: list[Batch] = _sampled_blocks(blocks, tokens).batches(
            max(1, batch_tokens // distributed.world())
        )
        available = sum(batch.tokens for batch in self._batches)
        self.tokens = min(tokens, available)
        self._positions = _positions(self._batches, self.tokens)
        self.layers = adapter.num_layers
        self.widths = adapter.widths
        self._keep = keep
        self._kept: list[Tensor] | Spilled = []
        if not keep and (spilled := adapter.spill()) is not None:
            self._keep, self._kept = True, spilled
        self.mean: list[Tensor] = []
        self.std: list[Tensor] = []

    def __iter__(self) -> Iterator[Tensor]:
        if len(self._kept) == self.layers:
            yield from self._kept
            return
        first = not self.mean
        mine = distributed.share(self._batches)
        stream = LayerwiseForward(self._adapter, mine)
        total = sum(batch.tokens for batch in mine)
        with self._clock.stage("activations", total * self.layers, "tokens x layers") as advance:
            for layer in range(self.layers):
                z, mean, std = self._layer(stream, layer, advance)
                if first:
                    self.mean.append(mean.cpu())
                    self.std.append(std.cpu())
                if self._keep:
                    self._kept.append(z)
                yield z
        self._adapter.release()

    def _layer(
        self, stream: LayerwiseForward, layer: int, advance: Advance
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows: list[Tensor] = []
        positions = distributed.share(self._positions)
        stream.advance(
            lambda index, x: rows.append(x[positions[index].to(x.device)].float()),
            on_batch=advance,
        )
        none = torch.empty(0, self.widths[layer], device=self._adapter.layer_device(layer))
        x = distributed.joined_rows(torch.cat([none, *rows]))
        if not bool(torch.isfinite(x.sum())):
            raise InvalidInput(
                f"NaN or Inf among the MLP activations of layer {layer}: the checkpoint is "
                "damaged, or the compute type overflows (try --dtype float32)"
            )
        return ica.standardise(x)

    def token_ids(self) -> Tensor:
        """The sampled tokens, int64 [tokens]."""
        return torch.cat(
            [
                batch.input_ids[batch.valid][positions]
                for batch, positions in zip(self._batches, self._positions, strict=True)
            ]
        )

    def contexts(self, sample: int) -> tuple[list[int], int]:
        """Token ids around one sampled token, and the token's place among them."""
        for batch, positions in zip(self._batches, self._positions, strict=True):
            if sample < len(positions):
                flat = int(torch.nonzero(batch.valid.flatten())[positions[sample]])
                row, column = divmod(flat, batch.input_ids.shape[1])
                ids = batch.input_ids[row][batch.valid[row]].tolist()
                start = max(0, column - CONTEXT_REACH)
                return ids[start : column + CONTEXT_REACH + 1], column - start
            sample -= len(positions)
        raise IndexError(sample)


def _sampled_blocks(blocks: TokenBlocks, tokens: int) -> TokenBlocks:
    enough = max(tokens, sum(len(block) for block in blocks.blocks[:LEAST_BLOCKS]))
    return blocks.subset(enough)


def _positions(batches: list[Batch], tokens: int) -> list[Tensor]:
    """For each batch the indices, among its valid tokens, of an even sample of `tokens` over all batches."""
    total = sum(batch.tokens for batch in batches)
    wanted = torch.arange(tokens) * total // tokens
    positions, start = [], 0
    for batch in batches:
        inside = (wanted >= start) & (wanted < start + batch.tokens)
        positions.append(wanted[inside] - start)
        start += batch.tokens
    return positions
